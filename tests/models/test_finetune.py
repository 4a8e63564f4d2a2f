"""Block-wise fine-tuning: masks stay, errors fall, a stopped run ends with the same bits."""

from copy import deepcopy

import pytest
import torch

import s3lab as s3
from s3lab.errors import DataError, SolveError
from s3lab.models.correct.finetune import Schedule, finetune
from s3lab.models.structure.capture import find_linears
from s3lab.models.structure.decoder import find_decoder

FAST = Schedule(epochs=2, batch=4, lr=3e-3)


@pytest.fixture
def pair(make_tiny, ids):
    """A function from a family to its pruned and its dense model."""

    def make(family="Llama", spec="2:4", dtype=torch.float32):
        dense = make_tiny(family).to(dtype)
        model = deepcopy(dense)
        s3.prune_model(model, None, spec, "magnitude", calibration=ids, progress=False)
        return model, dense

    return make


def weights(model):
    return {name: m.weight.clone() for layer in find_decoder(model).matrices for name, m in layer.items()}


@pytest.mark.parametrize("name", ["Qwen3", "GPT2", "OPT", "Qwen3Moe"])
def test_masks_stay_and_layers_come_nearer(pair, ids, name):
    model, dense = pair(name)
    before, others = weights(model), {n: p.clone() for n, p in dense.named_parameters()}
    rows = finetune(model, dense, ids, FAST, progress=False)
    assert [row["layer"] for row in rows] == [0, 1]
    assert all(row["kept"] and row["after"] < row["before"] for row in rows)
    for matrix, W in weights(model).items():
        assert torch.equal(W != 0, before[matrix] != 0), matrix
    assert any(not torch.equal(W, before[matrix]) for matrix, W in weights(model).items())
    assert all(torch.equal(p, others[n]) for n, p in dense.named_parameters())


def test_only_matrices_learn_and_the_model_is_left_as_it_was(pair, ids):
    model, dense = pair()
    model.train()
    names = set(find_linears(model, "model.layers.*"))
    before = {n: p.clone() for n, p in model.named_parameters()}
    finetune(model, dense, ids, FAST, progress=False)
    changed = {n.removesuffix(".weight") for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == names
    assert model.training and all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_error_told_is_that_of_the_layer(pair, ids):
    model, dense = pair()
    rows = finetune(model, dense, ids, FAST, held_out=0.0, progress=False)
    states = []
    for part in (model, dense):
        part.model.layers[0].register_forward_hook(lambda module, args, out: states.append(out))
        with torch.no_grad():
            part(input_ids=ids)
    apart = float((states[0] - states[1]).norm() / states[1].norm())
    assert rows[0]["after"] == pytest.approx(apart, rel=1e-4)
    assert rows[0]["test_after"] is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_too(pair, ids, dtype):
    model, dense = pair(dtype=dtype)
    masks = {name: W != 0 for name, W in weights(model).items()}
    rows = finetune(model, dense, ids, FAST, progress=False)
    assert {p.dtype for p in model.parameters()} == {dtype} and rows[0]["after"] < rows[0]["before"]
    assert all(not W[~masks[name]].any() for name, W in weights(model).items())


def test_a_run_that_was_stopped_ends_with_the_same_bits(pair, ids, tmp_path):
    model, dense = pair()
    whole, stopped, again = (deepcopy(model) for _ in range(3))
    expected = finetune(whole, dense, ids, FAST, progress=False)

    def stop(step):
        if step.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(stopped, dense, ids, FAST, out=tmp_path, progress=stop)
    heard = []
    rows = finetune(again, dense, ids, FAST, out=tmp_path, progress=heard.append)
    assert [step.layer for step in heard] == [1, 1] and [step.done for step in heard] == [3, 4]
    assert rows == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(DataError, match="other settings"):
        finetune(deepcopy(model), dense, ids, Schedule(epochs=1), out=tmp_path, progress=False)


def test_what_training_spoils_is_put_back(pair, ids):
    model, dense = pair()
    before = weights(model)
    rows = finetune(model, dense, ids, Schedule(epochs=1, batch=4, lr=3.0), progress=False)
    for row in rows:
        same = all(
            torch.equal(W, before[name]) for name, W in weights(model).items() if f"layers.{row['layer']}." in name
        )
        assert same != row["kept"]
    assert not rows[0]["kept"]


def test_models_that_are_no_pair_are_refused(pair, make_tiny, ids):
    model, dense = pair()
    with pytest.raises(DataError, match="share their weights"):
        finetune(model, model, ids, FAST)
    with pytest.raises(DataError, match="not of one shape"):
        finetune(model, make_tiny("OPT"), ids, FAST)
    with pytest.raises(DataError, match="leave none"):
        finetune(model, dense, ids[:1], FAST)
    for bad in ({"epochs": 0}, {"batch": 0}, {"lr": 0.0}):
        with pytest.raises(SolveError, match="at least 1"):
            Schedule(**bad)


@pytest.mark.gpu
def test_it_learns_on_cuda(pair, ids):
    model, dense = pair()
    rows = finetune(model.cuda(), dense.cuda(), ids, FAST, progress=False)
    assert all(row["after"] < row["before"] for row in rows)
