"""Permuted models: the dense model says what it said, the pattern keeps more, and heads and experts stay together."""

import pytest
import torch

import s3lab as s3
from s3lab.models.basis.permute import permute
from s3lab.models.structure.capture import find_linears

PAIRS = {  # what is permuted in a layer, by what makes it
    "Qwen3": {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.gate_proj, mlp.up_proj"},
    "Gemma": {"self_attn.o_proj": "self_attn.v_proj", "mlp.down_proj": "mlp.gate_proj, mlp.up_proj"},
    "OPT": {"self_attn.out_proj": "self_attn.v_proj", "fc2": "fc1"},
    "GPT2": {"mlp.c_proj": "mlp.c_fc"},
    "GPTNeoX": {"mlp.dense_4h_to_h": "mlp.dense_h_to_4h"},
    "Phi": {"self_attn.dense": "self_attn.v_proj", "mlp.fc2": "mlp.fc1"},
    "Qwen3Moe": {"self_attn.o_proj": "self_attn.v_proj"}
    | {f"mlp.experts.down_proj.{e}": f"mlp.experts.gate_up_proj.{e}" for e in range(4)},
}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def assert_moved(model, weights):
    """Every parameter holds the numbers that it held, to the bit."""
    for name, p in model.named_parameters():
        assert torch.equal(p.flatten().sort().values, weights[name].flatten().sort().values), name


def test_the_dense_model_says_what_it_said(make_tiny, ids, family):
    model = make_tiny(family).train()
    before, weights = logits(model.eval(), ids), {name: p.clone() for name, p in model.named_parameters()}
    rows = permute(model.train(), "2:4", "wanda", ids, sweeps=2)
    assert model.training
    apart = (logits(model.eval(), ids) - before).norm() / before.norm()
    assert apart < 1e-5
    assert any(not torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert_moved(model, weights)
    assert all(row["note"] or row["after"] > row["before"] for row in rows)


@pytest.mark.parametrize("name", PAIRS)
def test_each_input_is_permuted_with_what_makes_it(make_tiny, ids, name):
    rows = permute(make_tiny(name), "2:4", sweeps=1, calibration=ids)
    assert {row["matrices"]: row["producers"] for row in rows if row["layer"] == 0 and row["producers"]} == PAIRS[name]


def test_heads_that_share_values_are_permuted_alike_and_none_leaves_its_head(make_tiny, ids):
    plain, model = make_tiny("Qwen3"), make_tiny("Qwen3")
    permute(model, {"*.o_proj": "2:4", "*": "dense"})
    before, after = (next(iter(find_linears(m, "*.layers.0.*o_proj").values())).weight for m in (plain, model))
    order = torch.stack([(column == before.T).all(1).nonzero()[0, 0] for column in after.T])
    heads = order.view(2, 2, 8)  # groups, heads of a group, channels
    assert torch.equal(heads // 8, torch.arange(4).view(2, 2, 1).expand(2, 2, 8))
    assert torch.equal(heads[:, 0] % 8, heads[:, 1] % 8) and not torch.equal(order, torch.arange(32))


@pytest.mark.parametrize("by", ["magnitude", "wanda", "saliency"])
def test_what_is_told_to_be_kept_is_what_a_pruned_model_keeps(make_tiny, ids, by):
    """By hooks and masks of its own, on the model that comes out."""
    model = make_tiny("Llama")
    spec = {"*.down_proj": "2:4", "*": "dense"}
    rows = [row for row in permute(model, spec, by, ids, sweeps=1) if row["matrices"] == "mlp.down_proj"]
    for row in rows:
        linear = model.model.layers[row["layer"]].mlp.down_proj
        seen = []
        hook = linear.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].flatten(0, -2)))
        logits(model, ids)
        hook.remove()
        size = torch.cat(seen).square().mean(0)
        W = linear.weight.detach().abs()
        scores = {"magnitude": W, "wanda": W * size.sqrt(), "saliency": W**2 * size}[by]
        kept = scores.view(-1, 4).topk(2).values.sum() / scores.sum()
        assert float(kept) == pytest.approx(row["after"], rel=1e-4) and row["after"] > row["before"]


def test_rows_of_a_producer_count_under_its_own_pattern(make_tiny, ids):
    """Where only the rows of up can be told apart, they are what is put in order."""
    model = make_tiny("Llama")
    spec = "(M,K):(K,1) / (1,1) / (4,1) keep 2"
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    permute(model, {"*.up_proj": spec, "*": "dense"}, calibration=ids)
    after = model.model.layers[0].mlp.up_proj.weight.detach()
    kept = [float((W.abs() * s3.parse(spec).bind(W.shape).project(W.abs())).sum()) for W in (before, after)]
    assert kept[1] > kept[0] * 1.001


def test_half_precision_is_moved_and_not_rounded(make_tiny, ids):
    model = make_tiny("Qwen3").to(torch.bfloat16)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    permute(model, "2:4", calibration=ids, sweeps=1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_moved(model, weights)


def test_the_same_call_gives_the_same_model(make_tiny, ids):
    one, two = make_tiny("Llama"), make_tiny("Llama")
    assert permute(one, "2:4", "wanda", ids) == permute(two, "2:4", "wanda", ids)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_coupled_and_dense_matrices_have_no_say(make_tiny, ids):
    model = make_tiny("Llama")
    weights = [p.clone() for p in model.parameters()]
    rows = permute(model, ["mlp-channels keep 50%", {"*.q_proj": "2:4", "*": "dense"}], calibration=ids)
    assert all(row["note"] for row in rows)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
