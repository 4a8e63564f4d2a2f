"""A shrunk model says what the masked one said, is smaller, and is saved and loaded as any other."""

import json

import pytest
import torch

from s3lab.errors import DataError
from s3lab.models.prune.sequential import prune_model
from s3lab.models.prune.shrink import shrink
from s3lab.models.storage.checkpoint import save_pruned
from s3lab.models.structure.decoder import find_decoder

transformers = pytest.importorskip("transformers")

QUIET = {"progress": False, "batch": 4}
BOTH = "mlp-channels keep 75%; kv-groups keep 1"
EVEN = "o_proj: (M,8) & q_proj: (8,K) follows / (1,2) keep 1"  # a head of each group of two


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def count(model):
    return sum(p.numel() for p in model.parameters())


def reload(model, folder):
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


@pytest.mark.parametrize(
    ("kind", "spec", "sizes"),
    [
        ("Qwen3", BOTH, {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("Qwen3", EVEN, {"num_attention_heads": 2}),
        ("Qwen2", BOTH, {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("Llama", BOTH, {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("Llama", EVEN, {"num_attention_heads": 2}),
        ("Mistral", BOTH, {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("Gemma", BOTH, {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("Phi", BOTH, {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}),
        ("Qwen3Moe", "kv-groups keep 1", {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("OPT", "mlp-channels keep 75%", {"ffn_dim": 48}),
        ("GPT2", "mlp-channels keep 75%", {"n_inner": 96}),
        ("GPTNeoX", "mlp-channels keep 75%", {"intermediate_size": 48}),
    ],
)
def test_a_shrunk_model_says_the_same_and_is_loaded_as_any_other(make_tiny, ids, kind, spec, sizes, tmp_path):
    model = make_tiny(kind)
    prune_model(model, None, spec, "obd", **QUIET, calibration=ids)
    masked, size, names = logits(model, ids), count(model), set(state(model))
    shrunk = shrink(model)
    assert {name: after for name, (_, after) in shrunk.sizes.items()} == sizes
    assert shrunk.parameters == (size, count(model)) and count(model) < size
    assert set(state(model)) == names
    torch.testing.assert_close(logits(model, ids), masked, atol=1e-5, rtol=1e-5)
    loaded = reload(model, tmp_path)
    assert torch.equal(logits(loaded, ids), logits(model, ids)) and count(loaded) == count(model)
    cached = loaded.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(cached, model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0))


def test_a_dense_model_stays_as_it_is(make_tiny):
    model = make_tiny("Qwen3")
    before = state(model)
    shrunk = shrink(model)
    assert shrunk.sizes == {} and shrunk.parameters == (count(model),) * 2 and same(before, state(model))


def zero(model, path, rows=None, columns=None):
    """Zero rows or columns of one matrix in every layer."""
    for layer in find_decoder(model).layers:
        W = layer.get_submodule(path).weight.data
        W[slice(None) if rows is None else rows, slice(None) if columns is None else columns] = 0


def test_only_what_nothing_reads_is_taken_out(make_tiny, ids):
    model = make_tiny("Qwen2")
    zero(model, "mlp.gate_proj", rows=[0, 1, 2])  # read by columns that are not zero
    zero(model, "self_attn.v_proj", rows=slice(0, 8))  # its bias is not zero
    before = state(model)
    assert shrink(model).sizes == {} and same(before, state(model))
    zero(model, "mlp.down_proj", columns=[5, 9])  # fed by rows that are not zero
    zero(model, "self_attn.o_proj", columns=slice(16, 32))
    masked = logits(model, ids)
    assert shrink(model).sizes == {
        "intermediate_size": (64, 62),
        "num_key_value_heads": (2, 1),
        "num_attention_heads": (4, 2),
    }
    torch.testing.assert_close(logits(model, ids), masked, atol=1e-5, rtol=1e-5)
    kept = [channel for channel in range(64) if channel not in (5, 9)]
    for index, layer in enumerate(model.model.layers):
        assert torch.equal(layer.mlp.up_proj.weight, before[f"model.layers.{index}.mlp.up_proj.weight"][kept])
        assert torch.equal(layer.self_attn.k_proj.bias, before[f"model.layers.{index}.self_attn.k_proj.bias"][:8])
        assert (layer.mlp.up_proj.out_features, layer.mlp.down_proj.in_features) == (62, 62)


def test_gradients_dtype_and_mode_stay(make_tiny, ids):
    model = make_tiny("Llama").bfloat16().train()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    zero(model, "mlp.down_proj", columns=slice(0, 32))
    shrink(model)
    layer = model.model.layers[0]
    assert model.training and layer.training and layer.mlp.up_proj.weight.dtype == torch.bfloat16
    assert not layer.mlp.up_proj.weight.requires_grad and layer.mlp.down_proj.weight.requires_grad
    model(ids, labels=ids).loss.backward()
    assert layer.mlp.down_proj.weight.grad.shape == (32, 32)


def uneven_layers(model):
    zero(model, "mlp.down_proj", columns=slice(0, 8))
    model.model.layers[1].mlp.down_proj.weight.data[:, 8:24] = 0


def uneven_groups(model):
    model.model.layers[1].self_attn.o_proj.weight.data[:, :16] = 0


def uneven_heads(model):
    zero(model, "self_attn.o_proj", columns=slice(8, 16))


def two_heads_of_four(model):
    zero(model, "self_attn.out_proj", columns=slice(0, 16))


def one_head_of_four(model):
    zero(model, "self_attn.o_proj", columns=slice(0, 8))


@pytest.mark.parametrize(
    ("kind", "options", "damage", "message"),
    [
        ("Llama", {}, uneven_layers, "channels of the MLP: 56 of layer 0 are not zero and 40 of layer 1"),
        ("Llama", {}, uneven_groups, "groups of heads: 2 of layer 0 are not zero and 1 of layer 1"),
        ("Llama", {}, uneven_heads, "heads: 2 of group 1 of layer 0 are not zero and 1 of group 0 of layer 0"),
        # transformers takes a head of OPT to be the hidden size by the number of heads
        (
            "OPT",
            {},
            two_heads_of_four,
            r"OPT.* has no room .*num_attention_heads = 2.* and \(16, 32\) is left",
        ),
        ("Llama", {"num_key_value_heads": 4}, one_head_of_four, "LlamaForCausalLM has no room .*not a multiple"),
    ],
)
def test_what_no_config_can_say_is_refused_with_the_reason(make_tiny, kind, options, damage, message):
    model = make_tiny(kind, **options)
    damage(model)
    before, config = state(model), model.config.to_dict()
    with pytest.raises(DataError, match=message):
        shrink(model)
    assert same(before, state(model)) and model.config.to_dict() == config


@pytest.mark.parametrize(
    ("damage", "sizes"),
    [
        (uneven_layers, {"intermediate_size": (64, 56)}),
        (uneven_groups, {}),
        (uneven_heads, {}),
        (lambda model: (uneven_layers(model), one_head_of_four(model)), {"intermediate_size": (64, 56)}),
    ],
)
def test_zero_ones_are_kept_up_to_the_largest_if_asked(make_tiny, ids, damage, sizes, tmp_path):
    model = make_tiny("Qwen3")
    damage(model)
    masked = logits(model, ids)
    assert shrink(model, pad=True).sizes == sizes
    torch.testing.assert_close(logits(model, ids), masked, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(reload(model, tmp_path), ids), logits(model, ids))


def test_a_layer_of_which_nothing_is_left_keeps_one_of_each(make_tiny, ids):
    model = make_tiny("Qwen3")
    zero(model, "mlp.down_proj")
    zero(model, "self_attn.o_proj")
    masked = logits(model, ids)
    after = {name: after for name, (_, after) in shrink(model).sizes.items()}
    assert after == {"intermediate_size": 1, "num_key_value_heads": 1, "num_attention_heads": 1}
    assert torch.equal(logits(model, ids), masked)


def test_a_saved_shrunk_model_says_so_in_its_record_and_card(make_tiny, ids, tmp_path):
    model = make_tiny("Qwen3")
    run = prune_model(model, None, BOTH, "magnitude", **QUIET, calibration=ids)
    shrunk = shrink(model)
    save_pruned(model, None, tmp_path, run, shrunk)
    record = json.loads((tmp_path / "s3lab.json").read_text())
    assert record["shrunk"]["sizes"]["intermediate_size"] == [64, 48]
    card = (tmp_path / "README.md").read_text()
    assert f"| Shrunk | {shrunk} |" in card and "Whole parts that were zero are taken out" in card
    assert "`mlp-channels keep 75%; kv-groups keep 1`" in card
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True).eval()
    assert torch.equal(logits(loaded, ids), logits(model, ids))
