"""Magnitude pruning: keep the blocks of the largest norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from s3lab.solvers.base import ScoreSolver
from s3lab.tensors.problem import Problem


@dataclass(frozen=True)
class Magnitude(ScoreSolver):
    """Keep the blocks of the largest Euclidean norm, Σ w² over the block; needs no Hessian.  Cost: M·K.

    W (M, K) alone decides.  Raises SpecError where the pattern does not fit it.

    >>> import torch
    >>> import s3lab as s3
    >>> W, H = torch.tensor([[4.0, 1.0, 1.0, 4.0]]), torch.diag(torch.tensor([1.0, 100.0, 100.0, 1.0]))
    >>> s3.prune(W, "2:4", H, Magnitude()).mask.tolist()
    [[True, False, False, True]]
    """

    def score(self, problem: Problem) -> Tensor:
        return problem.weight**2
