"""Variance correction: pruned weights stretched until they vary as much as the dense ones did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from s3lab.algebra.coupled import CoupledPartition
from s3lab.errors import ShapeError, SolveError
from s3lab.shapes import Float
from s3lab.solvers.base import Bound, Problems, Solver
from s3lab.tensors.problem import Problem
from s3lab.tensors.processes import SOLO, ProcessGroup

Per = Literal["row", "matrix"]


@dataclass(frozen=True)
class MatchVariance(Solver):
    """What ``solver`` finds, its weights stretched by `match_variance` to the variance of the dense ones.

    The mask is the inner solver's.  Made for scores, which leave weights as they are; what a solver has fitted has
    its least error already, and loses by it.  A later ``refit`` undoes it.  Raises SolveError where ``solver`` is none.

    >>> import s3lab as s3
    >>> H, corrected = torch.eye(4), MatchVariance(s3.Wanda())
    >>> s3.prune(torch.tensor([[3.0, -1.0, 1.0, -3.0]]), "2:4", H, corrected).weight.square().sum().item()
    20.0
    """

    solver: Solver
    per: Per = "row"

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise SolveError(f"MatchVariance({self.solver!r}): give a solver such as s3lab.Wanda()")
        _check_per(self.per)

    def solve(self, problem: Problem, bound: Bound) -> tuple[Tensor, Tensor, dict[str, Any]]:
        mask, weight, stats = self.solver.solve(problem, bound)
        return mask, self._correct(problem, weight, mask), stats

    def solve_coupled(
        self, problems: Problems, bound: CoupledPartition
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        masks, weights, stats = self.solver.solve_coupled(problems, bound)
        return (
            masks,
            {name: self._correct(p, weights.get(name, p.weight), masks[name]) for name, p in problems.items()},
            stats,
        )

    def _correct(self, problem: Problem, weight: Tensor, mask: Tensor) -> Tensor:
        return match_variance(weight.masked_fill(~mask, 0), problem.weight, self.per, problem.processes)


def match_variance(
    W_hat: Float[Tensor, "M K"], W: Float[Tensor, "M K"], per: Per = "row", processes: ProcessGroup = SOLO
) -> Float[Tensor, "M K"]:
    """Return Ŵ·√(Var W / Var Ŵ), so that Var Ŵ, over each row or over the whole matrix, zeros included, is Var W.

    Var w = mean w² − (mean w)².  A row without variance, dense or pruned, stays as it is.  In the dtype of Ŵ, on its
    device; of a group of processes each gives its rows.  Raises ShapeError for weights of different shapes, SolveError
    for another ``per``.

    Source: arXiv 2507.03052, variance correction, as we read its summary: that the variance is of the weights, and
    over a row, is our reading.

    >>> match_variance(torch.tensor([[2.0, 0.0, 0.0, -2.0]]), torch.tensor([[2.0, 2.0, -2.0, -2.0]])).round(decimals=4)
    tensor([[ 2.8284,  0.0000,  0.0000, -2.8284]])
    """
    _check_per(per)
    if W_hat.shape != W.shape:
        raise ShapeError(f"pruned {tuple(W_hat.shape)} and dense {tuple(W.shape)} weights: give one matrix twice")
    ratio = (_vary(W, per, processes) / _vary(W_hat, per, processes)).sqrt()
    return (W_hat * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)).to(W_hat.dtype)


def _vary(W: Tensor, per: Per, processes: ProcessGroup) -> Tensor:
    """The variance in float64, (M, 1) or a scalar; zero where it is no more than what rounding leaves of equals."""
    W = W.double()
    moments = torch.stack([W, W.square()]).mean(-1, keepdim=True)
    if per == "matrix":
        moments = processes.sum(moments.sum(1)).flatten() / processes.total(len(W))
    mean, square = moments
    variance = square - mean**2
    return torch.where(variance > 1e-12 * square, variance, 0.0)


def _check_per(per: str) -> None:
    if per not in ("row", "matrix"):
        raise SolveError(f"per = {per!r}: the variance is taken over each 'row' or over the whole 'matrix'")
