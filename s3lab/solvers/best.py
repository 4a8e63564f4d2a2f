"""The best of several solvers' supports: what is cheap to try is tried, so that no rival can be ahead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from s3lab.algebra.coupled import CoupledPartition
from s3lab.errors import PatternError, SolveError
from s3lab.solvers.base import ALONE, Bound, Problems, Solver
from s3lab.solvers.refit import Refit
from s3lab.tensors.problem import Problem

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Best(Solver):
    """What ``solver`` finds, unless a rival's support with its exact weights has a lower error: then that.

    Errors are compared as they are reported, undamped, summed over all tensors of a coupling.  A rival is given up as
    soon as `Refit` can tell that no weights on its support would win, and left out where it does not take the pattern.
    ``stats["support"]`` is the repr of the solver that the support is from.  Raises SolveError for what is no solver.

    Cost: that of all solvers, and a few steps of conjugate gradients for each rival.

    >>> import torch
    >>> import s3lab as s3
    >>> W, H = torch.tensor([[4.0, 1.0, 1.0, 4.0]]), torch.diag(torch.tensor([1.0, 100.0, 100.0, 1.0]))
    >>> found = s3.prune(W, "2:4", H, Best(s3.Magnitude(), (s3.Wanda(),)))
    >>> found.mask.tolist(), found.stats["support"]
    ([[False, True, True, False]], 'Wanda()')
    """

    solver: Solver
    rivals: tuple[Solver, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.rivals, tuple) or not all(isinstance(s, Solver) for s in (self.solver, *self.rivals)):
            raise SolveError(f"Best({self.solver!r}, {self.rivals!r}): give a solver, and a tuple of solvers as rivals")

    def solve(self, problem: Problem, bound: Bound) -> tuple[Tensor, Tensor, dict[str, Any]]:
        def solve(solver: Solver) -> tuple[Tensors, Tensors, dict[str, Any]]:
            mask, weight, stats = solver.solve(problem, bound)
            return {ALONE: mask}, {ALONE: weight}, stats

        masks, weights, stats = self._compare({ALONE: problem}, solve)
        return masks[ALONE], weights[ALONE], stats

    def solve_coupled(
        self, problems: Problems, bound: CoupledPartition
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        masks, weights, stats = self._compare(problems, lambda solver: solver.solve_coupled(problems, bound))
        return dict(masks), dict(weights), stats

    def _compare(self, problems: Problems, solve: Any) -> tuple[Tensors, Tensors, dict[str, Any]]:
        masks, weights, stats = solve(self.solver)
        stats = {**stats, "support": repr(self.solver)}
        least = sum(problem.loss(weights.get(name, problem.weight), masks[name]) for name, problem in problems.items())
        for rival in self.rivals if least else ():
            try:
                tried, _, _ = solve(rival)
            except PatternError:
                continue
            fitted, told, loss = {}, {"refit_steps": 0, "residual": 0.0}, 0.0
            for name, problem in problems.items():
                fit = Refit()(problem, tried[name], below=least - loss)
                loss += problem.loss(fit.weight, tried[name])
                if not loss < least:
                    break
                fitted[name] = fit.weight
                told = {
                    "refit_steps": max(told["refit_steps"], fit.steps),
                    "residual": max(told["residual"], fit.residual),
                }
            else:
                masks, weights, least = tried, fitted, loss
                stats = {**stats, **told, "support": repr(rival)}
        return masks, weights, stats
