"""A whole model with wrapped cores: each matrix is the product, and its row tells what that holds beside the core."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import s3lab as s3
from s3lab.models.storage.checkpoint import read_parts, save_pruned
from s3lab.models.storage.packed import pack_model, unpack_model
from s3lab.packing.weigh import weigh

IDS = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))


def make_model():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))


def make_conv1d():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def prune(make=make_model, **options):
    return s3.prune_model(make(), None, "2:4", "sparsegpt", calibration=IDS, progress=False, **options)


@pytest.fixture(scope="module")
def wrapped():
    """A run on the moments of the dense model; copies of it may be changed."""
    return prune(wrap=s3.Wrap(block=4), hessians="dense")


def test_each_matrix_is_at_or_below_its_core_alone(wrapped):
    """On the same moments."""
    alone = prune(hessians="dense")
    for with_wrap, without in zip(wrapped.matrices, alone.matrices, strict=True):
        assert with_wrap["error"] < without["error"] and with_wrap["density"] == 0.5
        M, K = with_wrap["shape"]
        assert with_wrap["extra"] == (M * 4 + K * 4) / (M * K) and "wrapped" in with_wrap["note"]
    weight = wrapped.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert float((weight == 0).double().mean()) < 0.4


def test_it_goes_on_with_its_parts(tmp_path):
    run = prune(wrap=s3.Wrap(block=4), out=tmp_path / "run")
    again = prune(wrap=s3.Wrap(block=4), out=tmp_path / "run")
    assert run.wrapped.keys() == again.wrapped.keys() and len(run.wrapped) == 14
    for name, found in run.wrapped.items():
        weight, parts = again.model.get_submodule(name).weight, again.wrapped[name]
        assert torch.equal(run.model.get_submodule(name).weight, weight) and torch.equal(parts.dense, weight)
        assert all(
            torch.equal(getattr(found, part), getattr(parts, part)) for part in ("left", "core", "right", "mask")
        )


@pytest.mark.parametrize("make", [make_model, make_conv1d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_core_gives_what_the_product_gives(make, dtype, tmp_path):
    """In the dtype that it is stored in, which may be another than it was pruned in."""
    run = prune(make, wrap=s3.Wrap(block=4))
    save_pruned(run.model.to(dtype), None, tmp_path / "pruned", run)
    assert pack_model(tmp_path / "pruned", tmp_path / "packed") == {}
    unpack_model(tmp_path / "packed", tmp_path / "dense")
    dense, packed, unpacked = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("pruned", "packed", "dense")
    )
    packed.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        expected = dense(IDS).logits
        assert all(torch.equal(model(IDS).logits, expected) for model in (packed, unpacked, again))
    for line in weigh(tmp_path / "packed"):
        if line.spec:
            M, K = line.shape
            extra = 8 * dtype.itemsize * 4 * (M + K) / (M * K)
            assert line.bits == pytest.approx(8 * dtype.itemsize / 2 + 0.75 + extra, abs=0.01)
            assert line.wraps == dtype.itemsize * 4 * (M + K)


def test_what_is_no_product_of_its_parts_stays_dense(wrapped, tmp_path):
    save_pruned(wrapped.model, None, tmp_path / "pruned", wrapped)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    model.save_pretrained(tmp_path / "pruned")
    told = pack_model(tmp_path / "pruned", tmp_path / "packed")
    assert (
        list(told) == ["model.layers.1.mlp.up_proj"] and "no longer the product" in told["model.layers.1.mlp.up_proj"]
    )
    (tmp_path / "pruned" / "wraps.safetensors").unlink()
    told = pack_model(tmp_path / "pruned", tmp_path / "none")
    assert len(told) == 14 and all("does not have its parts" in reason for reason in told.values())


def test_a_later_run_leaves_no_parts_of_an_earlier_one(wrapped, tmp_path):
    for run in (wrapped, prune()):
        save_pruned(run.model, None, tmp_path / "pruned", run)
        assert (tmp_path / "pruned" / "wraps.safetensors").exists() == (run is wrapped)


def test_the_loss_weighs_what_a_wrap_leaves(monkeypatch):
    """By how much it hangs on each output, in the errors that rows tell, too."""
    seen = []

    def spy(W, *args, **options):
        found = s3.wrap(W, *args, **options)
        seen.append((found.error, s3.output_error(found.dense, W, args[1], options["outputs"]), options["outputs"]))
        return found

    monkeypatch.setattr("s3lab.models.prune.layerwise.wrap", spy)
    run = prune(wrap=s3.Wrap(block=8), hessians="dense", hessian="loss")
    assert [row["error"] for row in run.matrices] == [error for error, _, _ in seen]
    assert all(error == by_hand and len(set(outputs.tolist())) > 1 for error, by_hand, outputs in seen)


def test_what_does_not_go_with_a_wrap_is_told():
    with pytest.raises(s3.SolveError, match="leave those off"):
        prune(wrap=s3.Wrap(block=4), refit=True)
    with pytest.raises(s3.ShapeError, match="divisor of both"):
        prune(wrap=s3.Wrap(block=5))


def test_a_matrix_of_another_shape_keeps_no_parts(wrapped, tmp_path):
    """As one is that was taken apart since."""
    run = replace(wrapped, model=deepcopy(wrapped.model))
    run.model.model.layers[0].mlp.up_proj = torch.nn.Linear(16, 24, bias=False)
    save_pruned(run.model, None, tmp_path / "pruned", run)
    assert run.wrapped.keys() - read_parts(tmp_path / "pruned").keys() == {"model.layers.0.mlp.up_proj"}
