"""Magnitude pruning: keep the blocks of the largest norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from s3lab.solvers.base import ScoreSolver
from s3lab.tensors.problem import Problem


@dataclass(frozen=True)
class Magnitude(ScoreSolver):
    """Keep the blocks of the largest Euclidean norm, Σ w² over the block; needs no Hessian.  Cost: M·K."""

    def score(self, problem: Problem) -> Tensor:
        return problem.weight**2
