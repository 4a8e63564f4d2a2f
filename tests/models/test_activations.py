"""Models that prune their inputs: what their layers compute, decoding, padding, learning, and what is saved."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn

import s3lab as s3
from s3lab.models.inputs import activations, calibrate
from s3lab.models.inputs.activations import Activation, SparseLinear, load, save
from s3lab.models.inputs.calibrate import Learning, collect_inputs, measure_inputs, sparsify
from s3lab.tensors.activation import bind_token, prune_tokens, split_low_rank, weigh_columns

QUICK = Learning(steps=8, lr=2e-2, tokens=64, at_once=5)
EVERYTHING = Activation("2:4", "clact", shift="learned", variance=True, scale=True, rank=3)
EVERY = [
    Activation("8:16"),
    Activation("2:4", "amber", shift="median", variance=True),
    Activation("1:4", "clact", shift="channel"),
    Activation("50%/row", shift="layer", rank=2),
    EVERYTHING,
]


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


@pytest.fixture
def model(make_tiny):
    return make_tiny("Qwen3")


@pytest.mark.parametrize("chosen", EVERY, ids=str)
def test_a_cache_and_padding_change_nothing(model, ids, chosen):
    with sparsify(model, chosen, calibration=ids[:4], learning=QUICK):
        whole = logits(model, ids[:3])
        out = model(input_ids=ids[:3, :7], use_cache=True)
        parts = [out.logits]
        for t in range(7, ids.shape[1]):  # token after token, beside the cache
            out = model(input_ids=ids[:3, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
        # rows of 16 and of 10 tokens, padded on the left
        padded = torch.stack([ids[0], torch.cat([torch.zeros(6, dtype=torch.long), ids[1, :10]])])
        mask = torch.tensor([[1] * 16, [0] * 6 + [1] * 10])
        places = (mask.cumsum(1) - 1).clamp(min=0)
        beside = logits(model, padded, attention_mask=mask, position_ids=places)
        torch.testing.assert_close(beside[1, 6:], logits(model, ids[1:2, :10])[0], rtol=1e-4, atol=1e-4)


def test_generate_is_the_greedy_choice_of_full_forwards(model, ids):
    with sparsify(model, Activation("8:16", shift="median", variance=True)):
        prompt = ids[:2, :5]
        mask = torch.ones_like(prompt)
        found = model.generate(
            prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        for t in range(5, 11):
            assert torch.equal(found[:, t], logits(model, found[:, :t])[:, -1].argmax(-1))


def test_all_parts_together_are_the_formula(ids):
    layer = nn.Linear(16, 5)
    body = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    X = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    pruners = {"layers.0": calibrate._make("layers.0", EVERYTHING, layer, calibrate.Inputs.of(layer))}
    pruner, W = pruners["layers.0"], layer.weight.detach()
    pruner.factor, pruner.shift, pruner.scale = X.norm(dim=0), X.mean(0), torch.linspace(-0.2, 0.2, 5)
    with activations.attach(body, pruners), torch.no_grad():
        kept = prune_tokens(X, bind_token(s3.parse("2:4"), 16), X.norm(dim=0), X.mean(0), True)
        A, B = split_low_rank(W, 3)
        expected = (1 + pruner.scale) * (kept @ W.T + (X - kept) @ (A @ B).T) + layer.bias
        torch.testing.assert_close(layer(X), expected, rtol=1e-5, atol=1e-5)


def test_a_pattern_that_keeps_all_changes_nothing_and_removal_restores(model, ids):
    dense, state = logits(model, ids), {name: t.clone() for name, t in model.state_dict().items()}
    with sparsify(model, Activation("4:4", variance=True, shift="mean", rank=2)) as sparsified:
        torch.testing.assert_close(logits(model, ids), dense, rtol=1e-4, atol=1e-4)
        assert all(isinstance(layer, SparseLinear) for layer in sparsified.layers.values())
        assert model.state_dict().keys() == state.keys()  # what is pruned by is no part of the model's state
    assert torch.equal(logits(model, ids), dense)
    assert not any(isinstance(module, SparseLinear) for module in model.modules())


def test_the_globs_choose_and_the_head_stays(model):
    with sparsify(model, "2:4") as every:
        assert len(every.layers) == 14 and "lm_head" not in every.layers
    assert not every.layers
    with sparsify(model, "2:4", "*.q_proj") as some, sparsify(model, "8:16", ["*.down_proj", "lm_head"]) as others:
        assert all(name.endswith("q_proj") for name in some.layers) and len(others.layers) == 3
        with pytest.raises(s3.DataError, match=r"q_proj prunes its input already, by 2:4"):
            sparsify(model, "1:4")
    with pytest.raises(s3.DataError, match="no linear layer is called 'nothing'"):
        sparsify(model, "2:4", "nothing")


def test_what_is_measured_is_of_the_calibration_text(model, ids):
    layers = activations.choose_linears(model, "*.0.*.down_proj")
    ((name, X),) = collect_inputs(model, layers, ids, batch=5).items()
    found = measure_inputs(model, layers, ids, batch=5)[name]
    assert found.tokens == len(X) == ids.numel()
    torch.testing.assert_close(found.mean.float(), X.mean(0))
    for chosen in (Activation("2:4", "clact", "channel"), Activation("2:4", "amber", "layer")):
        with sparsify(model, chosen, "*.0.*.down_proj", ids) as sparsified:
            pruner = sparsified.layers[name].pruner
            if chosen.criterion == "clact":
                torch.testing.assert_close(pruner.factor, X.norm(dim=0) / len(X) ** 0.5)
                torch.testing.assert_close(pruner.shift, X.mean(0))
            else:
                assert torch.equal(pruner.factor, weigh_columns(layers[name].weight.detach()))
                torch.testing.assert_close(pruner.shift, X.mean().expand(64))
    assert layers[name].training is False


@pytest.mark.parametrize(("shift", "scale"), [("learned", False), (None, True), ("learned", True)])
def test_learning_lowers_the_error_of_every_layer(model, ids, shift, scale):
    plain = Activation("2:4", variance=not scale)
    seen = collect_inputs(model, activations.choose_linears(model, None), ids, 4)
    dense = {name: layer(seen[name]) for name, layer in activations.choose_linears(model, None).items()}

    def errors(activation):
        with sparsify(model, activation, calibration=ids, learning=QUICK) as found, torch.no_grad():
            return [(layer(seen[name]) - dense[name]).square().mean() for name, layer in found.layers.items()]

    before, after = errors(plain), errors(replace(plain, shift=shift, scale=scale))
    assert all(a <= b for a, b in zip(after, before, strict=True)) and sum(after) < sum(before)


def test_learning_sees_the_calibration_text_alone(model, ids, monkeypatch):
    seen = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, input_ids, **more: seen.append(input_ids) or forward(self, input_ids, **more),
    )
    with sparsify(model, EVERYTHING, calibration=ids[:4], learning=QUICK):
        assert len(seen) > 1 and all(bool((rows[:, None] == ids[:4]).all(-1).any(-1).all()) for rows in seen)
    with sparsify(model, EVERYTHING, calibration=ids[:4], learning=QUICK) as again:
        first = {name: layer.pruner.shift.clone() for name, layer in again.layers.items()}
    with sparsify(model, EVERYTHING, calibration=ids[:4], learning=QUICK) as again:
        assert all(torch.equal(first[name], layer.pruner.shift) for name, layer in again.layers.items())


@pytest.mark.parametrize("chosen", EVERY, ids=str)
def test_it_is_saved_beside_the_model_and_loaded(model, ids, chosen, tmp_path):
    other = deepcopy(model)
    with sparsify(model, chosen, calibration=ids[:4], learning=QUICK):
        expected = logits(model, ids)
        model.save_pretrained(tmp_path)
        assert save(model, tmp_path) == tmp_path
        copied = deepcopy(model)
    assert torch.equal(logits(copied, ids), expected)  # a copy is a model of its own
    with load(other, tmp_path) as loaded:
        assert torch.equal(logits(other, ids), expected)
        assert {layer.pruner.activation for layer in loaded.layers.values()} == {chosen}
    assert not {path.suffix for path in tmp_path.iterdir()} - {".json", ".safetensors"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_float32(model, ids, dtype):
    with sparsify(model, EVERYTHING, calibration=ids[:4], learning=QUICK):
        expected = logits(model, ids)
        found = logits(model.to(dtype), ids)
        assert found.dtype == dtype and found.isfinite().all()
        assert (found.float() - expected).norm() < 0.35 * expected.norm()  # a mask that flips is a jump
    with sparsify(model, EVERYTHING, calibration=ids[:4], learning=QUICK):
        assert logits(model, ids).isfinite().all()  # and learned there


def test_no_tokens_no_rows(model):
    layer = activations.choose_linears(model, "*.0.*.down_proj")
    with sparsify(model, Activation("8:16", shift="median", variance=True, rank=2), "*.0.*.down_proj"):
        for part in layer.values():
            assert part(torch.zeros(0, 64)).shape == (0, 32) and part(torch.zeros(2, 0, 64)).shape == (2, 0, 32)


def test_a_file_of_another_model_or_a_broken_one_is_refused(model, make_tiny, ids, tmp_path):
    with sparsify(model, Activation("2:4", shift="channel"), calibration=ids):
        save(model, tmp_path)
    with pytest.raises(s3.DataError, match="is no part of the model"):
        load(make_tiny("OPT"), tmp_path)
    with pytest.raises(s3.DataError, match=r"q_proj is \(32, 48\), and its pruning is of \(32, 32\)"):
        load(make_tiny("Qwen3", hidden_size=48), tmp_path)
    settings = json.loads((tmp_path / activations.SETTINGS).read_text())
    (tmp_path / activations.SETTINGS).write_text(json.dumps({name: {"pattern": "2:4"} for name in settings}))
    with pytest.raises(s3.DataError, match="holds no saved pruning"):
        load(model, tmp_path)


def test_layers_of_another_kind_are_refused(make_tiny):
    with pytest.raises(s3.DataError, match="no linear layer"):
        sparsify(make_tiny("GPT2"), "2:4")  # its matrices are no nn.Linear

    class Other(nn.Linear):
        pass

    with pytest.raises(s3.DataError, match="a Other and no plain"):
        sparsify(nn.Sequential(Other(4, 4)), "2:4", "0")
