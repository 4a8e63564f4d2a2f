"""What every solver is and returns: a frozen set of options, called on a problem and a spec, that gives a Solution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from s3lab.algebra.partition import Partition
from s3lab.algebra.spec import Spec
from s3lab.errors import SolveError
from s3lab.shapes import Bool, Float
from s3lab.tensors.meter import Meter
from s3lab.tensors.problem import Problem


@dataclass(frozen=True, eq=False)
class Solution:
    """A pruned weight, with what it costs.

    ``weight`` (M, K) has the dtype and device of the weight that came in, ``mask`` (M, K) is True where it was kept.
    ``error`` and ``error_test`` are relative output errors on the calibration and the held-out moment, None without
    one.  ``solver`` is the repr that made it; ``stats`` holds ``time_s``, ``mem_mib`` (peak above the start),
    ``damp`` as used, and what the solver has to say.
    """

    weight: Float[Tensor, "M K"]
    mask: Bool[Tensor, "M K"]
    error: float | None
    error_test: float | None
    spec: Spec
    solver: str
    stats: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        figures = {"error": self.error, "error_test": self.error_test, **self.stats}
        told = ", ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items() if v is not None
        )
        return f"Solution({str(self.spec)!r}, {self.solver}, shape={tuple(self.weight.shape)}, {told})"


@dataclass(frozen=True)
class Solver(ABC):
    """A method with its options; its repr is its provenance.  Subclasses write `solve`."""

    def __call__(self, problem: Problem, spec: Spec) -> Solution:
        """Prune ``problem`` under ``spec``; the problem is not touched.

        A factorisation that fails inside raises the damping tenfold and starts again, which ``stats["damp"]`` shows.
        Raises SpecError or ShapeError where the spec does not fit, SolveError where the solver cannot go on.
        """
        part = spec.bind(problem.shape)
        with torch.no_grad(), Meter(problem.W.device) as meter:
            problem, mask, weight, stats = self._solve_damped(problem, part)
        return conclude(
            problem,
            spec,
            mask,
            weight,
            repr(self),
            {"time_s": meter.time_s, "mem_mib": meter.mem_mib, **stats},
        )

    @abstractmethod
    def solve(self, problem: Problem, part: Partition) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return the mask, the weight in the working dtype, and what there is to say."""

    def _solve_damped(self, problem: Problem, part: Partition) -> tuple[Problem, Tensor, Tensor, dict[str, Any]]:
        while True:
            try:
                return problem, *self.solve(problem, part)
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                problem = problem.damped_more()


def conclude(
    problem: Problem, spec: Spec, mask: Tensor, weight: Tensor, solver: str, stats: dict[str, Any]
) -> Solution:
    """Check a result against its spec and measure it.

    Raises SpecError if the mask breaks the spec, SolveError if the weight is not finite: both are faults of a
    solver, never of its input.
    """
    spec.check(mask)
    weight = weight.masked_fill(~mask, 0).to(problem.W.dtype)
    if not weight.isfinite().all():
        raise SolveError(
            f"{solver} on {spec} gave weights beyond the range of {problem.W.dtype} at damp = {problem.damp:g}: "
            "raise the damping, or prune in float32"
        )
    if problem.H is None:
        return Solution(weight, mask, None, None, spec, solver, stats)
    stats = {**stats, "damp": problem.damping}
    return Solution(weight, mask, problem.error(weight), problem.error_test(weight), spec, solver, stats)


@dataclass(frozen=True)
class ScoreSolver(Solver):
    """A solver that keeps the blocks with the highest sums of element scores, and their weights as they are."""

    @abstractmethod
    def score(self, problem: Problem) -> Float[Tensor, "M K"]:
        """Return the worth of each weight on its own."""

    def solve(self, problem: Problem, part: Partition) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return part.project(self.score(problem)), problem.weight, {}
