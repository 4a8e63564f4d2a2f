"""Bad input ends in one clear sentence that names the layer, and leaves the module as it was."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import s3lab as s3
from s3lab.training import METHODS


def network(tie=False):
    model = nn.ModuleDict({"embed": nn.Embedding(8, 16), "fc": nn.Linear(16, 12), "head": nn.Linear(16, 8, bias=False)})
    if tie:
        model["head"].weight = model["embed"].weight
    return model


def refuse(message, *args, model=None, **options):
    model = model or network()
    before = [type(part) for part in model.modules()]
    with pytest.raises(s3.SpecError, match=message):
        s3.sparse(model, *args, **options)
    assert [type(part) for part in model.modules()] == before
    assert all(p.requires_grad or name == "fc.weight" for name, p in model.named_parameters())


@pytest.mark.parametrize("name", METHODS)
def test_a_spec_that_does_not_fit_names_the_layer(name):
    refuse("fc: the block of 1:2@16x1 takes 16 of the 12", {"fc": "1:2@16x1", "*": "2:4"}, name)


def test_layers_that_are_not_there_or_not_decided_are_told():
    refuse("no linear layer is called 'f'; there are fc, head", "2:4", layers="f")
    refuse(r"no glob of fc matches 'head'", {"fc": "2:4"})
    refuse(r"'\*.up' decides no matrix", {"*.up": "1:4", "*": "2:4"})
    refuse("all layers are to stay dense", "dense")
    refuse("couples up, not among the layers: fc, head", "fc: (M,1) & up: (1,K) keep 50%")
    refuse("fc, head: the grids of fc and head do not match", "fc: (1,K) & head: (1,K) keep 50%")


def test_tied_weights_are_refused_by_both_names_and_a_shared_layer_is_one_layer():
    refuse("head shares its weight with embed.weight, which would stay dense", "2:4", model=network(tie=True))
    s3.sparse(network(tie=True), {"head": "dense", "*": "2:4"})
    layer = nn.Linear(16, 16)
    sparsity = s3.sparse(nn.Sequential(layer, layer), "2:4")
    assert list(sparsity.masks) == ["0"]


def test_a_layer_is_parametrised_once():
    model = network()
    s3.sparse(model, "2:4", layers="fc")
    refuse("fc is parametrised already: densify it first", "2:4", model=model)
    s3.sparse(model, {"fc": "dense", "*": "1:4"}, "rigl")
    s3.densify(model)
    parametrize.register_parametrization(model["fc"], "weight", nn.Identity())
    refuse("fc is parametrised already", "2:4", model=model)


def test_what_is_dense_cannot_be_made_dense():
    with pytest.raises(s3.SpecError, match="no layer of this ModuleDict is sparse"):
        s3.densify(network())


@pytest.mark.parametrize("name", METHODS)
def test_a_frozen_layer_is_for_methods_that_do_not_train_its_weight(name):
    model = network()
    model["fc"].weight.requires_grad_(False)
    if name in ("fixed", "spp", "lora", "s2ft"):
        s3.sparse(model, "2:4", name)
        assert not s3.densify(model)["fc"].weight.requires_grad and model["head"].weight.requires_grad
    else:
        refuse("fc is frozen, and .* trains its weight: unfreeze it", "2:4", name, model=model)


def test_masks_that_are_missing_or_break_their_pattern_name_the_layer():
    masks = {"fc": torch.ones(12, 16, dtype=torch.bool)}
    lawful = {"fc": torch.tensor([True, True, False, False]).repeat(12, 4)}
    refuse("no mask is given for head", "2:4", "fixed", masks=lawful)
    refuse("fc: the mask breaks 2:4", "2:4", "spp", layers="fc", masks=masks)


@pytest.mark.parametrize(
    "make",
    [
        lambda: s3.SRSTE(decay=-1.0),
        lambda: s3.SRSTE(decay=math.nan),
        lambda: s3.Gradual(steps=0),
        lambda: s3.Gradual(every=0),
        lambda: s3.Gradual(start=-1),
        lambda: s3.Gradual(initial=1.0),
        lambda: s3.RigL(steps=0),
        lambda: s3.RigL(every=0),
        lambda: s3.RigL(alpha=0.0),
        lambda: s3.RigL(start="smallest"),
        lambda: s3.Proximal(strength=-1.0),
        lambda: s3.SPP(rank=0),
        lambda: s3.SPP(scale=math.inf),
        lambda: s3.LoRA(rank=0),
        lambda: s3.LoRA(scale=0.0),
        lambda: s3.S2FT(choose="best"),
        lambda: s3.sparse(network(), "2:4", "srst"),
    ],
)
def test_options_that_cannot_be(make):
    with pytest.raises(s3.SolveError):
        make()


def test_a_schedule_starts_no_sparser_than_it_ends():
    refuse("a sparsity of 0.6 at first is above that of 2:4, 0.5", "2:4", s3.Gradual(initial=0.6))


@pytest.mark.parametrize("method", [s3.Gradual(steps=3, every=2), s3.RigL(steps=3, every=1)])
def test_past_the_end_of_a_schedule_the_mask_stays(method):
    model = network()
    sparsity = s3.sparse(model, "2:4", method, layers="fc")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.follow(optimizer)
    for number in range(8):
        if number == 3:
            last = sparsity.masks["fc"].clone()
        optimizer.zero_grad()
        model["fc"](torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
    assert torch.equal(sparsity.masks["fc"], last) and sparsity.steps == 8
    s3.parse("2:4").check(last)


@pytest.mark.parametrize("method", ["srste", "rigl"])
def test_a_step_that_was_not_prepared_is_told(method):
    sparsity = s3.sparse(network(), "2:4", method)
    with pytest.raises(s3.SolveError, match=r"call prepare\(\) there, or follow\(optimizer\)"):
        sparsity.step()


def test_a_proximal_step_needs_an_optimiser_that_trains_the_weight_and_has_what_it_is_asked_for():
    model = network()
    sparsity = s3.sparse(model, "2:4", s3.Proximal(adaptive=True), layers="fc")
    with pytest.raises(s3.SolveError, match="takes the rate from the optimiser"):
        sparsity.step()
    with pytest.raises(s3.SolveError, match="fc: this SGD does not train its weight"):
        sparsity.step(torch.optim.SGD(model["head"].parameters(), lr=0.1))
    with pytest.raises(s3.SolveError, match="fc: SGD has no second moment: leave adaptive off"):
        sparsity.step(torch.optim.SGD(model.parameters(), lr=0.1))
    refuse("fc: .* decides in rounds", "4:8@4x1 then 2:4", "proximal", layers="fc")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_served(name, dtype):
    model = network().to(dtype)
    model["fc"].weight.data.mul_(1e3)  # whose squares are beyond half precision
    sparsity = s3.sparse(model, "2:4", name, layers="fc")
    assert model["fc"].weight.dtype == dtype and model["fc"].weight.isfinite().all()
    sparsity.check()
    assert s3.densify(model)["fc"].weight.dtype == dtype


def test_a_layer_that_met_no_token_waits():
    """As an expert that no token reached: it has no gradient, and keeps its blocks."""
    for method in (s3.RigL(steps=9, every=1), s3.SRSTE()):
        model = network()
        sparsity = s3.sparse(model, "2:4", method)
        before = sparsity.masks["head"].clone()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsity.follow(optimizer)
        model["fc"](torch.randn(4, 16)).square().sum().backward()
        optimizer.step()
        assert torch.equal(sparsity.masks["head"], before)
