"""What is no input of a run is named as such, shapes unchecked by anything else."""

import pytest
import torch

from s3lab.errors import ShapeError, SolveError
from s3lab.models.sequential import prune_model


@pytest.mark.parametrize("ids", [torch.ones(2, 16), torch.ones(16).long(), torch.ones(2, 0).long()])
def test_what_is_no_table_of_tokens_is_named(make_tiny, ids):
    with pytest.raises(ShapeError, match="expected sequences of tokens"):
        prune_model(make_tiny("Qwen3"), None, "2:4", progress=False, calibration=ids)


def test_an_unknown_source_of_second_moments_is_named(make_tiny, ids):
    with pytest.raises(SolveError, match="hessians = 'sparse'"):
        prune_model(make_tiny("Qwen3"), None, "2:4", hessians="sparse", progress=False, calibration=ids)
