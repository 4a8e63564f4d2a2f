"""What packed models weigh: bytes by hand, nothing twice, and no perplexity lost on the way."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensorCUTLASS

from s3lab.algebra.patterns import parse
from s3lab.errors import SpecError
from s3lab.lab.study.weigh import Weighing, _find_tensors, count_memory, find_layers, time_layers, time_models
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.pretraining import RECIPES, build
from s3lab.packing.codec import ALONE, pack
from s3lab.packing.file import Entry
from s3lab.packing.gpu import Fragments
from s3lab.packing.linear import PackedLinear

MODELS = {"dense": ["same", "int8"], "2:4": ["same", "int4"], "mlp-channels keep 50%": ["same"]}


@pytest.fixture(scope="module")
def weighed():
    """The rows of an untrained toy, by pattern and values, and the toy."""
    ids = torch.randint(0, 512, (10, 32), generator=torch.Generator().manual_seed(0))
    dense = build(RECIPES["toy"]).eval()
    before = {name: p.clone() for name, p in dense.named_parameters()}
    ground = Weighing(dense, load_model("reference")[1], ids, ids[:2], "magnitude", prompt=8, tokens=2, repeats=1)
    rows = {(row["pattern"], row["values"]): row for row in ground.rows(MODELS)}
    assert all(torch.equal(p, before[name]) for name, p in dense.named_parameters())
    return rows, dense


def test_bytes_a_weight_are_those_of_the_values_and_the_index(weighed):
    rows, dense = weighed
    mlp = sum(module.weight.numel() for name, module in find_layers(dense).items() if ".mlp." in name)
    weights = sum(module.weight.numel() for module in find_layers(dense).values())
    expected = {
        ("dense", "same"): 32,
        ("dense", "int8"): 8 + 32 / 128,
        ("2:4", "same"): 32 / 2 + 0.75,
        ("2:4", "int4"): (4 + 32 / 128) / 2 + 0.75,
        ("mlp-channels keep 50%", "same"): 32 * (1 - mlp / weights / 2),
    }
    assert rows.keys() == expected.keys()
    for key, bits in expected.items():
        row = rows[key]
        assert 8 * row["bytes_per_weight"] == pytest.approx(bits)
        assert row["counted_bytes"] == pytest.approx(row["matrix_bytes"])
        assert row["matrix_bytes"] + row["rest_bytes"] < row["file_bytes"]
        assert row["rest_bytes"] == rows["dense", "same"]["rest_bytes"]


def test_a_packed_model_has_the_perplexity_of_the_pruned_one(weighed):
    rows, _ = weighed
    for (_, values), row in rows.items():
        assert (row["perplexity"] == row["unpacked_perplexity"]) is (values == "same")
        assert row["perplexity"] == pytest.approx(row["unpacked_perplexity"], rel=0.1)


def test_a_weighing_that_was_stopped_makes_only_what_is_missing(tmp_path, monkeypatch):
    ids = torch.randint(0, 512, (10, 32), generator=torch.Generator().manual_seed(0))
    told = (build(RECIPES["toy"]).eval(), load_model("reference")[1], ids, ids[:2], "magnitude")
    ground = Weighing(*told, prompt=8, tokens=2, repeats=1, folder=tmp_path)
    pruned, prune = [], Weighing._prune
    monkeypatch.setattr(Weighing, "_prune", lambda self, p, *rest: pruned.append(p) or prune(self, p, *rest))
    first = next(iter(ground.rows({"2:4": ["same"], "8:16": ["same"]})))
    both = list(ground.rows({"2:4": ["same"], "8:16": ["same"]}))
    assert both[0] == first and pruned == ["2:4", "8:16"]
    assert [row["pattern"] for row in both] == pruned
    list(replace(ground, seed=1).rows({"2:4": ["same"]}))
    with torch.no_grad():
        next(ground.dense.parameters()).mul_(2)
    list(replace(ground).rows({"2:4": ["same"]}))
    assert pruned == ["2:4", "8:16", "2:4", "2:4"]


def test_a_pattern_that_does_not_fit_is_told_before_any_is_pruned(tmp_path):
    ids = torch.zeros(2, 8, dtype=torch.long)
    ground = Weighing(build(RECIPES["toy"]).eval(), load_model("reference")[1], ids, ids, folder=tmp_path)
    with pytest.raises(SpecError, match=r"^model\.layers\.0\..*5:7"):
        list(ground.rows({"2:4": ["same"], "5:7": ["same"]}))
    assert not list(tmp_path.iterdir())


def test_each_storage_is_held_once():
    layer = nn.Linear(8, 8, bias=False)
    both = nn.ModuleList([layer, nn.Linear(8, 8, bias=False)])
    assert count_memory(both) == 2 * 8 * 8 * 4
    both[1].weight = layer.weight
    assert count_memory(both) == 8 * 8 * 4


def test_a_packed_layer_holds_its_buffers_and_its_layout():
    W = torch.randn(16, 64).bfloat16()
    W = W.where(parse("2:4").bind((16, 64)).project(W.float().abs()), 0)
    layer = PackedLinear.of(Entry(pack(W, "2:4"), {ALONE: "up"}), ALONE)
    stored = sum(buffer.nbytes for buffer in layer.buffers())
    assert stored == 16 * 64 * 8.75 / 8
    assert count_memory(layer) >= stored + 16 * 64 / 8  # a bit for each weight


def test_a_layer_for_tensor_cores_holds_its_values_by_rows_and_by_fragments(monkeypatch):
    W = torch.randn(32, 64).bfloat16()
    W = W.where(parse("block16").bind((32, 64)).project(W.float().abs()), 0)
    layer = PackedLinear.of(Entry(pack(W, "block16"), {ALONE: "up"}), ALONE)
    on_cpu = count_memory(layer) - layer.rows.runs.nbytes  # which only products of few tokens read
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    layer.to("cpu")  # which has it laid out again
    assert isinstance(layer.laid_out[1], Fragments)
    fragments = layer.values.nbytes + 32 // 2 * 64 // 16 // 8 + 32 * 8  # with a bit for each run, and the pairs
    assert count_memory(layer) == on_cpu + fragments


def test_what_sparse_tensor_cores_take_is_counted_by_its_parts():
    kept, indices = torch.zeros(32, 32).bfloat16(), torch.zeros(32, 4, dtype=torch.int16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a prototype
        form = SparseSemiStructuredTensorCUTLASS(torch.Size([32, 64]), kept, indices, None, None, None)
    assert sum(t.nbytes for t in _find_tensors(SimpleNamespace(form=form))) == kept.nbytes + indices.nbytes


def test_models_take_turns_on_one_prompt_and_what_they_write():
    seen = []

    def model(name):
        def run(input_ids, past_key_values, use_cache, logits_to_keep):
            seen.append((name, input_ids.shape[1], past_key_values))
            return SimpleNamespace(past_key_values="cache", logits=torch.zeros(1, logits_to_keep, 4))

        return run

    found = time_models([model("one"), model("other")], torch.zeros(1, 5, dtype=torch.long), tokens=2, repeats=3)
    turn = [(5, None), (1, "cache"), (1, "cache")]
    assert seen == [(name, *call) for _ in range(4) for name in ("one", "other") for call in turn]
    assert all(own.keys() == {"prefill_ms", "decode_ms"} for own in found)


def test_a_packed_layer_is_timed_on_the_right_product():
    rows = list(time_layers({"up": [64, 128]}, ["2:4", "block16"], tokens=(1, 16), repeats=1, cold=1 << 12))
    assert [(row["pattern"], row["tokens"]) for row in rows] == [(p, t) for p in ("2:4", "block16") for t in (1, 16)]
    assert all(row["error"] < 0.01 and row["dense_bytes"] == 64 * 128 * 2 for row in rows)
