"""A whole model with wrapped cores: each matrix is the product, and its row tells what that holds beside the core."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import s3lab as s3
from s3lab.models.storage.checkpoint import save_pruned
from s3lab.models.storage.packed import pack_model

IDS = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))


def make_model():
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))


def prune(**options):
    return s3.prune_model(make_model(), None, "2:4", "sparsegpt", calibration=IDS, progress=False, **options)


def test_each_matrix_is_at_or_below_its_core_alone():
    """On the moments of the dense model, which both see."""
    wrapped, alone = prune(wrap=s3.Wrap(block=4), hessians="dense"), prune(hessians="dense")
    for with_wrap, without in zip(wrapped.matrices, alone.matrices, strict=True):
        assert with_wrap["error"] < without["error"] and with_wrap["density"] == 0.5
        M, K = with_wrap["shape"]
        assert with_wrap["extra"] == (M * 4 + K * 4) / (M * K) and "wrapped" in with_wrap["note"]
    weight = wrapped.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    assert float((weight == 0).double().mean()) < 0.4


def test_it_goes_on_and_packs_as_what_it_is(tmp_path):
    run = prune(wrap=s3.Wrap(block=4), out=tmp_path / "run")
    again = prune(wrap=s3.Wrap(block=4), out=tmp_path / "run")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(run.model.get_parameter(name), again.model.get_parameter(name))
    save_pruned(run.model, None, tmp_path / "pruned", run)
    reasons = pack_model(tmp_path / "pruned", tmp_path / "packed")
    assert len(reasons) == 14 and all("zeros are in the core" in reason for reason in reasons.values())


def test_what_does_not_go_with_a_wrap_is_told():
    with pytest.raises(s3.SolveError, match="leave those off"):
        prune(wrap=s3.Wrap(block=4), refit=True)
    with pytest.raises(s3.ShapeError, match="divisor of both"):
        prune(wrap=s3.Wrap(block=5))
