"""Equalisation: the dense model says what it said, inputs and weights meet, and what cannot be absorbed is told."""

import pytest
import torch
from torch import nn

from s3lab.errors import DataError, SpecError
from s3lab.models.correct.equalise import equalise
from s3lab.models.structure.capture import find_linears

INTO = {
    "Qwen3": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "Llama": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "Gemma": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "OPT": ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"],
    "GPT2": ["ln_1", None, "ln_2", None],
    "GPTNeoX": ["input_layernorm", "post_attention_layernorm", None, None],
    "Phi": ["input_layernorm", "self_attn.v_proj", None],
}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_the_dense_model_says_what_it_said(make_tiny, ids, family, spread):
    model = spread(make_tiny(family))
    before, weights = logits(model, ids), {name: p.clone() for name, p in model.named_parameters()}
    rows = equalise(model, ids)
    apart = (logits(model, ids) - before).norm() / before.norm()
    assert apart < 1e-5
    assert any(not torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all((row["into"] is None) == bool(row["note"]) for row in rows)


@pytest.mark.parametrize("name", INTO)
def test_each_input_goes_into_what_makes_it(make_tiny, ids, name):
    rows = equalise(make_tiny(name), ids)
    assert [row["into"] for row in rows] == 2 * INTO[name]


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("Qwen3", "model.layers.0.mlp.down_proj"),
        ("OPT", "model.decoder.layers.0.fc2"),
        ("Qwen3", "model.layers.0.mlp.[gu]*_proj"),
        ("Llama", "model.layers.0.self_attn.[qkv]_proj"),
    ],
)
def test_the_largest_input_and_weight_of_a_channel_meet_over_all_that_read_it(make_tiny, ids, name, readers, spread):
    model = spread(make_tiny(name))
    linears = list(find_linears(model, readers).values())
    for linear, size in zip(linears, (1.0, 0.3, 3.0), strict=False):
        linear.weight.data *= size  # so that none of them is the largest by chance alone
    equalise(model, ids, readers)
    seen = []
    linears[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, -2)))
    logits(model, ids)
    X, W = torch.cat(seen).abs().amax(0), torch.cat([linear.weight for linear in linears]).abs().amax(0)
    alive = X > 0
    torch.testing.assert_close(X[alive], W[alive], rtol=1e-4, atol=0)


def test_heads_that_share_values_share_their_scale(make_tiny, ids):
    plain, model = make_tiny("Qwen3"), make_tiny("Qwen3")
    equalise(model, ids, "*.o_proj")
    scale = [
        after.weight / before.weight
        for before, after in zip(*(find_linears(m, "*.layers.0.*o_proj").values() for m in (plain, model)), strict=True)
    ]
    by_head = scale[0].median(0).values.view(2, 2, 8)  # groups, heads of a group, channels
    torch.testing.assert_close(by_head[:, 0], by_head[:, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_changes_by_rounding(make_tiny, ids, dtype):
    model = make_tiny("Qwen3").to(dtype)
    before = logits(model, ids).float()
    rows = equalise(model, ids)
    assert {p.dtype for p in model.parameters()} == {dtype} and [row["into"] for row in rows] == 2 * INTO["Qwen3"]
    assert (logits(model, ids).float() - before).norm() / before.norm() < 8 * torch.finfo(dtype).eps


def test_channels_and_weights_of_zeros_stay(make_tiny, ids):
    model = make_tiny("Llama")
    up, down = (model.model.layers[0].mlp.get_submodule(name).weight.data for name in ("up_proj", "down_proj"))
    up[3], down[:, 5] = 0, 0
    before = logits(model, ids)
    equalise(model, ids)
    assert not up[3].any() and not down[:, 5].any() and all(p.isfinite().all() for p in model.parameters())
    assert (logits(model, ids) - before).norm() / before.norm() < 1e-5


def test_what_nothing_can_absorb_is_refused_with_the_reason(make_tiny, ids):
    with pytest.raises(DataError, match=r"transformer.h.0.mlp.c_proj cannot.*channel by channel.*leave it out"):
        equalise(make_tiny("GPT2"), ids, "*.mlp.c_proj")
    with pytest.raises(SpecError, match="nowhere"):
        equalise(make_tiny("GPT2"), ids, "nowhere")


def test_a_norm_that_something_else_reads_too_is_left_alone(make_tiny, ids):
    """The router of experts reads the norm before them, and is no matrix to prune."""
    model = make_tiny("Qwen3Moe")
    norms = [layer.post_attention_layernorm.weight.clone() for layer in model.model.layers]
    rows = equalise(model, ids)
    assert all(
        torch.equal(a.post_attention_layernorm.weight, b) for a, b in zip(model.model.layers, norms, strict=True)
    )
    assert all("expert" in row["note"] for row in rows if "experts" in row["matrices"])


def test_only_what_is_asked_for_moves(make_tiny, ids):
    model = make_tiny("Qwen3")
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = equalise(model, ids, ["*.0.*.up_proj"])
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    stem = "model.layers.0."
    assert [row["matrices"] for row in rows] == ["mlp.gate_proj, mlp.up_proj"]
    assert changed == {f"{stem}{n}.weight" for n in ("mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm")}


def test_the_mode_of_the_model_is_kept(make_tiny, ids):
    model = make_tiny("Qwen3").train()
    equalise(model, ids)
    assert all(module.training for module in model.modules() if not isinstance(module, nn.Identity))
