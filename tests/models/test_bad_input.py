"""What is no input of a run is named as such, shapes unchecked by anything else."""

import pytest
import torch

from s3lab.errors import DataError, ShapeError, SolveError, SpecError
from s3lab.models.basis.permute import permute
from s3lab.models.basis.rotate import rotate
from s3lab.models.inputs.activations import Activation, SparseLinear, load, save
from s3lab.models.inputs.calibrate import Learning, sparsify
from s3lab.models.prune.sequential import prune_model


@pytest.mark.parametrize("ids", [torch.ones(2, 16), torch.ones(16).long(), torch.ones(2, 0).long()])
def test_what_is_no_table_of_tokens_is_named(make_tiny, ids):
    with pytest.raises(ShapeError, match="expected sequences of tokens"):
        prune_model(make_tiny("Qwen3"), None, "2:4", progress=False, calibration=ids)


def test_an_unknown_source_of_second_moments_is_named(make_tiny, ids):
    with pytest.raises(SolveError, match="hessians = 'sparse'"):
        prune_model(make_tiny("Qwen3"), None, "2:4", hessians="sparse", progress=False, calibration=ids)


def test_pruning_of_inputs_says_what_to_do(make_tiny, tmp_path):
    model = make_tiny("Qwen3")
    for options, reason in (
        ({"criterion": "wanda"}, "criterion='wanda': use one of act, clact, amber"),
        ({"shift": "max"}, "shift='max': use one of median"),
        ({"rank": -1}, "rank=-1"),
    ):
        with pytest.raises(SpecError, match=reason):
            Activation("2:4", **options)
    with pytest.raises(SolveError, match="impl='cuda'"):
        Activation("2:4", impl="cuda")
    with pytest.raises(SpecError, match="steps=0 learns nothing"):
        Learning(steps=0)
    for chosen in (Activation("2:4", "clact"), Activation("2:4", shift="channel"), Activation("2:4", scale=True)):
        with pytest.raises(DataError, match="give sequences of tokens"):
            sparsify(model, chosen)
    with pytest.raises(SpecError, match=r"layers\.0\.self_attn\.q_proj: '3:5' does not fit one token of 32"):
        sparsify(model, "3:5")
    with pytest.raises(SpecError, match=r"layers\.0\..*rank = 33"):
        sparsify(model, Activation("2:4", rank=33))
    assert not any(isinstance(module, SparseLinear) for module in model.modules())  # all or none
    with pytest.raises(DataError, match="no layer of Qwen3ForCausalLM prunes its input"):
        save(model, tmp_path)
    with pytest.raises(DataError, match="holds no saved pruning"):
        load(model, tmp_path)


def test_what_cannot_be_permuted_or_rotated_is_named(make_tiny, ids):
    model = make_tiny("Llama")
    with pytest.raises(DataError, match="by = 'obs': channels are permuted by magnitude, wanda, saliency"):
        permute(model, "2:4", "obs")
    with pytest.raises(DataError, match=r"wanda weighs inputs.*calibration"):
        permute(model, "2:4", "wanda")
    with pytest.raises(SpecError, match="remainder"):
        permute(model, "2:5")
    with pytest.raises(DataError, match="kind = 'random': a rotation is of kind hadamard or learned"):
        rotate(model, "random")
    with pytest.raises(DataError, match=r"learned on second moments.*calibration"):
        rotate(model, "learned")
    with pytest.raises(SolveError, match="steps = 0"):
        rotate(model, "learned", ids, steps=0)
