"""RIA: how much a weight matters among those of its row and of its column, times the strength of its input."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from torch import Tensor

from s3lab.errors import SolveError
from s3lab.solvers.base import ScoreSolver
from s3lab.tensors.problem import Problem


@dataclass(frozen=True)
class RIA(ScoreSolver):
    """Keep the blocks of the largest Σ |w_ij| (1 / Σ_k |w_ik| + 1 / Σ_k |w_kj|) ‖X_j‖^a, ‖X_j‖² = T·H_jj, undamped.

    ``power`` is a: 0 needs the weight alone, 1 is nearest to Wanda.  A row or column of zeros scores zero.  Raises
    SolveError for a power below 0.  Cost: M·K.

    Source: Zhang et al., *Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models*, 2024,
    whose scopes are rows or N:M groups; here any scope, and blocks by the sum of their elements.

    Magnitude keeps the heavy columns whatever flows through them, RIA the weights that their row and column need:

    >>> import torch
    >>> import s3lab as s3
    >>> W = torch.tensor([[4.0, 4.0, 1.0, 3.0], [9.0, 9.0, 0.0, 0.0]])
    >>> s3.prune(W, "2:4", torch.eye(4), RIA()).mask[0].tolist()
    [False, False, True, True]
    """

    power: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.power < inf:
            raise SolveError(f"{self}: the power of the inputs' norm is a number from 0, such as 0.5")

    def score(self, problem: Problem) -> Tensor:
        size = problem.weight.abs()
        columns = problem.processes.sum(size.sum(0))
        share = size / size.sum(1, keepdim=True) + size / columns
        return share.nan_to_num() * problem.power.sqrt() ** self.power
