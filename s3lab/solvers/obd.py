"""Optimal Brain Damage: the loss that a weight's removal costs if nothing else moves and inputs are uncorrelated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from s3lab.solvers.base import ScoreSolver
from s3lab.tensors.problem import Problem


@dataclass(frozen=True)
class OBD(ScoreSolver):
    """Keep the blocks of the largest Σ h_jj w_ij² with the diagonal of the damped H.  Cost: M·K.

    Source: LeCun, Denker, Solla, *Optimal Brain Damage*, 1989, equation 5, where each score is half of that.  On single
    weights in scopes of one row the order is Wanda's but for the damping; on larger blocks Wanda adds the roots.
    W (M, K), H (K, K); raises SolveError without an H.

    >>> import torch
    >>> import s3lab as s3
    >>> W, H = torch.tensor([[4.0, 1.0, 1.0, 4.0]]), torch.diag(torch.tensor([1.0, 100.0, 100.0, 1.0]))
    >>> s3.prune(W, "2:4", H, OBD()).mask.tolist()
    [[False, True, True, False]]
    """

    def score(self, problem: Problem) -> Tensor:
        return problem.weight**2 * problem.hessian.diagonal()
