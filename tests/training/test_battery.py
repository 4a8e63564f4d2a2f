"""One battery for every method on every pattern: the mask law at every step, and the same bits after a resume."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import s3lab as s3
from s3lab.training import METHODS

SPECS = [
    "2:4",
    "1:4",
    "2:4@1x2",
    "1:2@8x8",
    "50%",
    "25%/row",
    "25%/column",
    "50% rows",
    "25% columns",
    "coupled-2:4",
    "block16",
    "2:4 each way",
    "4:8@16x1 then 2:4",
    "2:4 plus 1:16",
    "8:16 plus 25%@4x4",
]
COUPLED = [
    '"2": (M,1) & "0": (1,K) follows keep 50%',
    '"0": (1,1) by (1,0) & "2": (1,1) keep 25%',
    '"0": (1,1) | "2": (1,1) keep 50%',
]
IN_ROUNDS = ("then", "plus")
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03, weight_decay=0.1),
}
QUICK = {"gradual": s3.Gradual(steps=4, every=1), "rigl": s3.RigL(steps=6, every=2), "proximal": s3.Proximal(0.5)}


def method_of(name):
    return QUICK.get(name, METHODS[name]())


def start(make, name, spec, optimizer="adamw", seed=0):
    model = make(seed=seed)
    sparsity = s3.sparse(model, spec, method_of(name), seed=seed)
    chosen = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    sparsity.follow(chosen)
    return model, sparsity, chosen


def expect_law(sparsity, spec, dense):
    """The masks keep what the spec asks for, told by the spec itself, and what they prune is zero, or was not moved."""
    pattern = s3.parse(spec)
    for unit in sparsity.units:
        names = list(unit.layers)
        seen = {name: unit.layers[name].weight for name in names}
        for name, weight in seen.items():
            rest = weight if sparsity.method.prunes else weight - dense[name]
            assert not rest[~sparsity.masks[name]].any()
        if isinstance(sparsity.method, s3.Gradual) and sparsity.steps < sparsity.method.steps:
            continue
        masks = {name: sparsity.masks[name] for name in names}
        pattern.check(masks if pattern.names else masks[names[0]])


def refused(name, spec):
    return name == "proximal" and any(word in spec for word in IN_ROUNDS)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=15)
@given(spec=st.sampled_from(SPECS + COUPLED), optimizer=st.sampled_from(list(OPTIMIZERS)), seed=st.integers(0, 3))
def test_the_mask_law_holds_at_every_step(make, learn, name, spec, optimizer, seed):
    if refused(name, spec):
        with pytest.raises(s3.SpecError, match="decides in rounds"):
            start(make, name, spec)
        return
    model, sparsity, chosen = start(make, name, spec, optimizer, seed)
    dense = {key: layer.weight.detach().clone() for unit in sparsity.units for key, layer in unit.layers.items()}
    dense = (
        dense if sparsity.method.prunes else {key: w.clone() for u in sparsity.units for key, w in u.weights.items()}
    )
    for number in range(5):
        expect_law(sparsity, spec, dense)
        learn(model, chosen, number)
        sparsity.check()
    expect_law(sparsity, spec, dense)
    seen = {key: layer.weight.detach().clone() for unit in sparsity.units for key, layer in unit.layers.items()}
    s3.densify(model)
    for key, weight in seen.items():
        layer = model.get_submodule(key)
        assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter and layer.weight.requires_grad
        assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("spec", ["2:4", "25%/row", COUPLED[0]])
def test_a_training_broken_off_goes_on_to_the_same_bits(make, learn, tmp_path, name, spec):
    model, sparsity, optimizer = start(make, name, spec)
    for number in range(3):
        learn(model, optimizer, number)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    for number in range(3, 8):
        learn(model, optimizer, number)
    saved = torch.load(tmp_path / "state", weights_only=True)
    again, resumed, other = start(make, name, spec, seed=1)  # whose weights, masks and draws are others
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert resumed.steps == 3
    for number in range(3, 8):
        learn(again, other, number)
    assert resumed.steps == sparsity.steps == 8
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_decides_and_nothing_else(make, learn, name):
    states = []
    for noise in range(2):
        model, _, optimizer = start(make, name, "25%/row")
        torch.manual_seed(noise)
        for number in range(4):
            learn(model, optimizer, number)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", METHODS)
def test_gradients_accumulate_to_those_of_one_batch(make, learn, name):
    """Two halves of a batch, one step: the same weights as by the whole, the method's own terms counted once."""
    found = []
    for parts in (1, 2):
        model, sparsity, optimizer = start(make, name, "2:4", "sgd")
        for number in range(4):
            generator = torch.Generator().manual_seed(number)
            X, Y = (torch.randn(8, 16, generator=generator, dtype=torch.float64) for _ in range(2))
            optimizer.zero_grad()
            for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
                ((model(x) - y).square().mean() / parts).backward()
            optimizer.step()
        found.append(model.state_dict())
        sparsity.check()
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key])


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_half_precision_train(make, learn, name, dtype):
    model = make(dtype=dtype)
    sparsity = s3.sparse(model, "2:4", method_of(name))
    optimizer = OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad])
    sparsity.follow(optimizer)
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        for number in range(3):
            learn(model, optimizer, number)
    sparsity.check()
    assert all(layer.weight.dtype == dtype for unit in sparsity.units for layer in unit.layers.values())
    assert any(not torch.equal(before[key], tensor) for key, tensor in model.state_dict().items() if "0." in key)


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_model_computes_the_same_without_a_break_in_its_graph(make, learn, name):
    """The mask changes and the graph stays: compiled once for training, whatever the steps do."""
    plain, _, one = start(make, name, "2:4")
    model, sparsity, other = start(make, name, "2:4")
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    for number in range(5):
        assert learn(plain, one, number) == pytest.approx(learn(compiled, other, number))
    assert len(graphs) == 1
    sparsity.check()
