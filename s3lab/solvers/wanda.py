"""Wanda: weight times the norm of its input."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from s3lab.solvers.base import ScoreSolver
from s3lab.tensors.problem import Problem


@dataclass(frozen=True)
class Wanda(ScoreSolver):
    """Keep the blocks of the largest Σ |w_ij| ‖X_j‖, ‖X_j‖² = T·H_jj, undamped.  Cost: M·K.

    Source: Sun et al., *A Simple and Effective Pruning Approach for Large Language Models*, 2023, whose scopes are
    rows or N:M groups; here any scope, and blocks by the sum of their elements.  W (M, K), H (K, K); raises
    SolveError without an H.

    >>> import torch
    >>> import s3lab as s3
    >>> W, H = torch.tensor([[4.0, 1.0, 1.0, 4.0]]), torch.diag(torch.tensor([1.0, 100.0, 100.0, 1.0]))
    >>> s3.prune(W, "2:4", H, Wanda()).mask.tolist()
    [[False, True, True, False]]
    """

    def score(self, problem: Problem) -> Tensor:
        return problem.weight.abs() * problem.power.sqrt()
