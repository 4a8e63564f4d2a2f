"""Pruned models packed: the same to the last bit, loaded and saved by transformers, and smaller."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

import s3lab as s3
from s3lab.lab import cli
from s3lab.models.prune.shrink import shrink
from s3lab.models.storage.checkpoint import save_pruned
from s3lab.models.storage.packed import pack_model, unpack_model
from s3lab.models.text.pretrained import load_model, to_dtype
from s3lab.packing.file import find_files, read_packed, read_tensors
from s3lab.packing.linear import PackedLinear
from s3lab.packing.weigh import weigh

transformers = pytest.importorskip("transformers")
TABLE = {"*.up_proj": "2:4", "*.down_proj": "2:4 plus 1:8", "*.q_proj": "4:8@4x1 then 2:4", "*": "dense"}
FAMILY_TABLES = {
    "Qwen3": TABLE,
    "OPT": {"*.fc1": "2:4", "*.k_proj": "50%", "*": "dense"},  # with biases
    "GPT2": {"*.c_fc": "2:4", "*.attn.c_proj": "50%/row", "*": "dense"},  # weights are stored the other way round
    "Qwen3Moe": {"*.q_proj": "2:4", "*.experts.*": "1:2", "*": "dense"},
}


def prune(model, spec, ids, out, small=False):
    run = s3.prune_model(model, None, spec, "magnitude", calibration=ids, progress=False)
    shrunk = shrink(model) if small else None
    save_pruned(model, None, out, run, shrunk)
    return out


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("name", FAMILY_TABLES)
def test_a_packed_model_is_the_same_to_the_last_bit(name, make_tiny, ids, tmp_path):
    out = prune(make_tiny(name).bfloat16(), FAMILY_TABLES[name], ids, tmp_path / "pruned")
    pack_model(out, tmp_path / "packed")
    packed, dense = load(tmp_path / "packed"), load(out)
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) >= 2
    assert torch.equal(logits(packed, ids), logits(dense, ids))
    packed.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), ids), logits(dense, ids))
    dense_bytes = sum(tensor.nbytes for tensor in read_tensors(find_files(out))[0].values())
    assert sum(line.bytes for line in weigh(tmp_path / "again")) < dense_bytes
    for folder in ("packed", "again"):
        unpack_model(tmp_path / folder, tmp_path / "dense")
        found, expected = (read_tensors(find_files(path))[0] for path in (tmp_path / "dense", out))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())


def test_what_the_run_left_dense_stays_so_and_is_told(make_tiny, ids, tmp_path):
    out = prune(make_tiny("Qwen3Moe"), FAMILY_TABLES["Qwen3Moe"], ids, tmp_path / "pruned")
    dense = pack_model(out, tmp_path / "packed")
    assert all("experts" in name for name in dense)
    assert set(dense.values()) == {"not stored as one matrix", "left dense by the run"}  # some saw too few tokens


def test_a_coupling_has_one_index(make_tiny, ids, tmp_path):
    out = prune(make_tiny("Llama"), "mlp-channels keep 75%; 2:4", ids, tmp_path / "pruned")
    pack_model(out, tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed"), ids), logits(load(out), ids))
    entries, _ = read_packed(tmp_path / "packed")
    coupled = [entry for entry in entries if len(entry.names) > 1]
    assert len(coupled) == 2 and all(len(entry.names) == 3 and entry.packed.pattern.names for entry in coupled)
    stored = read_tensors(find_files(tmp_path / "packed"))[0]
    assert sum(name.endswith("mlp.down_proj.index") for name in stored) == 2
    assert not any(name.endswith(("up_proj.index", "gate_proj.index")) for name in stored)


def test_a_shrunk_model_packs_what_is_still_sparse(make_tiny, ids, tmp_path):
    out = prune(make_tiny("Llama"), "mlp-channels keep 75%; 2:4", ids, tmp_path / "pruned", small=True)
    dense = pack_model(out, tmp_path / "packed")
    assert {name.rpartition(".")[2] for name in dense} == {"up_proj", "gate_proj", "down_proj"}
    packed = load(tmp_path / "packed")
    assert packed.config.intermediate_size == 48
    assert isinstance(packed.model.layers[0].self_attn.q_proj, PackedLinear)
    assert torch.equal(logits(packed, ids), logits(load(out), ids))


@pytest.mark.parametrize("first", ["s3lab", "transformers"])
def test_a_fresh_process_loads_it_whichever_is_imported_first(first, make_tiny, ids, tmp_path):
    out = prune(make_tiny("Llama"), "2:4", ids, tmp_path / "pruned")
    pack_model(out, tmp_path / "packed")
    second = "s3lab" if first == "transformers" else "transformers"
    code = (
        f"import {first}\nimport {second}\nimport torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'packed')!r}).eval()\n"
        "with torch.inference_mode():\n"
        f"    logits = model(input_ids=torch.tensor({ids[:2].tolist()}), use_cache=False).logits\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert torch.allclose(found, logits(load(out), ids[:2]), atol=1e-5)


def test_other_dtypes_and_copies_hold_what_they_should(make_tiny, ids, tmp_path):
    out = prune(make_tiny("Qwen3").bfloat16(), TABLE, ids, tmp_path / "pruned")
    pack_model(out, tmp_path / "packed")
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).eval()
    dense = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert torch.equal(logits(wide, ids), logits(dense, ids))
    wide.save_pretrained(tmp_path / "wide")
    assert torch.equal(logits(load(tmp_path / "wide"), ids), logits(dense, ids))
    assert torch.equal(
        logits(load(tmp_path / "packed").to(torch.float32), ids), logits(load(out).to(torch.float32), ids)
    )


def test_values_are_rounded_where_that_is_asked(make_tiny, ids, tmp_path):
    out = prune(make_tiny("Llama"), "2:4", ids, tmp_path / "pruned")
    exact = logits(load(out), ids)
    errors, sizes = [], []
    for values in ("int8", "int4"):
        pack_model(out, tmp_path / values, values=values, group=16)
        found = load(tmp_path / values)
        unpack_model(tmp_path / values, tmp_path / "dense")
        assert torch.equal(logits(found, ids), logits(load(tmp_path / "dense"), ids))
        found.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(load(tmp_path / "again"), ids), logits(found, ids))
        errors.append(float((logits(found, ids) - exact).norm() / exact.norm()))
        sizes.append(sum(line.bytes for line in weigh(tmp_path / values) if line.spec))
    assert 0 < errors[0] < 0.05 < errors[1] < 1 and sizes[1] < sizes[0]


def test_the_pattern_that_keeps_all_makes_a_quantised_model(make_tiny, ids, tmp_path):
    out = prune(make_tiny("Llama").bfloat16(), "1:1", ids, tmp_path / "pruned")
    assert not pack_model(out, tmp_path / "packed", values="int8")
    lines = [line for line in weigh(tmp_path / "packed") if line.spec]
    assert len(lines) == 14 and all(line.index == 0 and line.bits == 8 + 16 / 128 for line in lines)
    exact, found = logits(load(out), ids).float(), logits(load(tmp_path / "packed"), ids).float()
    assert 0 < float((found - exact).norm() / exact.norm()) < 0.05


def test_a_model_of_several_files_is_packed_and_stays_whole(make_tiny, ids, tmp_path):
    out = prune(make_tiny("Llama"), "2:4", ids, tmp_path / "pruned")
    model = load(out)
    model.save_pretrained(out, max_shard_size="40KB")
    (out / "model.safetensors").unlink()
    pack_model(out, tmp_path / "packed")
    packed = load(tmp_path / "packed")
    packed.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "many"), ids), logits(model, ids))
    unpack_model(tmp_path / "many", tmp_path / "dense")
    assert torch.equal(logits(load(tmp_path / "dense"), ids), logits(model, ids))
    shard = sorted((tmp_path / "many").glob("*.safetensors"))[1]
    assert weigh(shard)
    index = tmp_path / "many" / "model.safetensors.index.json"
    told = json.loads(index.read_text())
    told["weight_map"] = {key: name for key, name in told["weight_map"].items() if name != shard.name}
    index.write_text(json.dumps(told))
    with pytest.raises(s3.DataError, match="lacks"):
        read_packed(tmp_path / "many")


def test_a_matrix_that_is_not_pruned_as_the_record_says_is_refused(make_tiny, ids, tmp_path):
    out = prune(make_tiny("Llama"), "2:4", ids, tmp_path / "pruned")
    record = json.loads((out / "s3lab.json").read_text())
    record["matrices"][3]["spec"] = "1:4"
    (out / "s3lab.json").write_text(json.dumps(record))
    with pytest.raises(s3.SpecError, match=r"model\.layers\.0.*: the weight breaks 1:4 at scope 0"):
        pack_model(out, tmp_path / "packed")


def test_the_commands_tell_what_they_did_and_refuse_in_a_sentence(make_tiny, ids, tmp_path, capsys):
    out = prune(make_tiny("Llama").bfloat16(), "2:4", ids, tmp_path / "pruned")
    packed, dense = tmp_path / "packed", tmp_path / "dense"
    assert cli.main(["pack", str(out), "--out", str(packed)]) == 0
    assert "14 matrices packed" in capsys.readouterr().out
    assert cli.main(["inspect", str(packed)]) == 0
    told = capsys.readouterr().out
    row = next(line for line in told.splitlines() if line.startswith("model.layers.0.mlp.up_proj"))
    assert row.split()[1:4] == ["64×32", "bfloat16", "2:4"] and row.split()[-2:] == ["8.7500", "8.7500"]
    assert cli.main(["unpack", str(packed), "--out", str(dense)]) == 0
    assert (dense / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    for command, message in (
        (["pack", str(out), "--out", str(out)], "is the model itself"),
        (["pack", str(packed), "--out", str(dense)], "packed or quantised model"),
        (["pack", str(tmp_path), "--out", str(dense)], "cannot be read"),
        (["pack", str(out), "--values", "int4", "--group", "0", "--out", str(dense)], "'0' is out of range"),
        (["inspect", str(out)], "is not packed by s3lab"),
        (["inspect", str(tmp_path)], "no safetensors file"),
        (["unpack", str(out), "--out", str(dense)], "is not packed by s3lab"),
    ):
        assert cli.main(command) == 2
        assert message in capsys.readouterr().err


def test_a_damaged_file_is_no_model(make_tiny, ids, tmp_path):
    out = prune(make_tiny("Llama"), "2:4", ids, tmp_path / "pruned")
    pack_model(out, tmp_path / "packed")
    shutil.copytree(tmp_path / "packed", tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(s3.DataError, match="not as it was written"):
        load(tmp_path / "damaged")
    load_model("reference")[1].save_pretrained(tmp_path / "damaged")
    with pytest.raises(s3.DataError, match="not as it was written"):
        load_model(tmp_path / "damaged")


def test_a_model_there_and_back_in_another_dtype_is_the_same_packed_or_not(tmp_path):
    model, tokenizer = load_model("tiny")
    ids = torch.arange(64)[None] * 7 % 512
    run = s3.prune_model(model, tokenizer, "2:4", "magnitude", sequences=2, length=32, progress=False)
    save_pruned(model, tokenizer, tmp_path / "pruned", run)
    pack_model(tmp_path / "pruned", tmp_path / "packed")
    for own in (model, load_model(tmp_path / "packed")[0]):
        with torch.inference_mode():
            before = own(ids).logits
            to_dtype(own, torch.float32)
            assert own.dtype == torch.float32 and own(ids).logits.dtype == torch.float32
            to_dtype(own, torch.bfloat16)
            assert torch.equal(own(ids).logits, before)
