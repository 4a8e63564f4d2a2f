"""The shapes in annotations are checked while tests run."""

import jaxtyping
import pytest
import torch

from s3lab.models.search.loss import measure_gradients
from s3lab.tensors.hessian import output_error


def test_shapes_that_do_not_go_together_are_noticed():
    W, H = torch.zeros(2, 3), torch.eye(3)
    assert output_error(W, W, H) == 0.0
    with pytest.raises(jaxtyping.TypeCheckError):
        output_error(W, W, torch.eye(4))
    with pytest.raises(jaxtyping.TypeCheckError):
        measure_gradients(torch.nn.Linear(1, 1), [], torch.zeros(8, dtype=torch.int64))
