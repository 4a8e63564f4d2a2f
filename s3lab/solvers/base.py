"""What every solver is and returns: a frozen set of options, called on a problem and a spec, that gives a Solution."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor

from s3lab.algebra import compose
from s3lab.algebra.couple import Coupled
from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.picture import draw_corner
from s3lab.algebra.spec import Pattern
from s3lab.algebra.stage import Decide, Stage
from s3lab.errors import SolveError, SpecError
from s3lab.markup import caption
from s3lab.shapes import Bool, Float
from s3lab.tensors.joint import join
from s3lab.tensors.meter import Meter
from s3lab.tensors.problem import Problem, measure
from s3lab.tensors.processes import SOLO, ProcessGroup
from s3lab.tensors.shard import over_rows

Bound = compose.Bound | Stage
Problems = Mapping[str, Problem]
ALONE = ""  # the name of a tensor that is not coupled


@dataclass(frozen=True, eq=False)
class Solution:
    """A pruned weight, with what it costs.

    ``weight`` (M, K) has the dtype and device of the weight that came in, ``mask`` (M, K) is True where it was kept.
    ``error`` and ``error_test`` are relative output errors on the calibration and the held-out moment, None without
    one.  ``solver`` is the repr that made it; ``stats`` holds ``time_s``, ``mem_mib`` (peak above the start),
    ``damp`` as used, and what the solver has to say.

    >>> import s3lab as s3
    >>> solution = s3.prune(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), "2:4", torch.eye(4), "magnitude")
    >>> solution.weight.tolist(), solution.mask.tolist(), f"{solution.error:.3f}"
    ([[3.0, 0.0, 0.0, 4.0]], [[True, False, False, True]], '0.408')
    """

    weight: Float[Tensor, "M K"]
    mask: Bool[Tensor, "M K"]
    error: float | None
    error_test: float | None
    spec: Pattern
    solver: str
    stats: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        figures = {"error": self.error, "error_test": self.error_test, **self.stats}
        told = ", ".join(
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items() if v is not None
        )
        return f"Solution({str(self.spec)!r}, {self.solver}, shape={tuple(self.weight.shape)}, {told})"

    def _repr_html_(self) -> str | None:
        if self.spec.names:
            return None
        kept = self.mask.cpu().flatten()
        drawing = draw_corner(self.spec.bind(self.mask.shape).first_part, lambda offset: bool(kept[offset]))
        return caption(drawing, repr(self))


@dataclass(frozen=True)
class Solver(ABC):
    """A method with its options; its repr is its provenance.  Subclasses write `solve`."""

    @overload
    def __call__(self, problem: Problem, spec: Pattern) -> Solution: ...
    @overload
    def __call__(self, problem: Problems, spec: Pattern) -> dict[str, Solution]: ...
    def __call__(self, problem: Problem | Problems, spec: Pattern) -> Solution | dict[str, Solution]:
        """Prune ``problem`` under ``spec``, or several by name under a coupling; none of them is touched.

        A factorisation that fails inside raises the damping tenfold and starts again, which ``stats["damp"]`` shows.
        Raises SpecError or ShapeError where the spec does not fit, SolveError where the solver cannot go on.
        """
        return self.prune({ALONE: problem}, spec)[ALONE] if isinstance(problem, Problem) else self.prune(problem, spec)

    def prune(
        self, problems: Problems, spec: Pattern, processes: ProcessGroup = SOLO, salient: ScoreSolver | None = None
    ) -> dict[str, Solution]:
        """Prune problems by name, a single one under the name `ALONE`, by all processes of a group.

        Salient blocks, where the spec has any, are picked by the scores of ``salient``.
        """
        alone, coupled = ALONE in problems, isinstance(spec, Coupled)
        if alone is coupled:
            raise SpecError(f"{spec} is for {'several tensors by name' if coupled else 'one tensor'}: give just that")
        problems = measure(problems)
        shapes = {name: problem.shape for name, problem in problems.items()}
        bound = spec.bind(shapes if coupled else shapes[ALONE])
        told = repr(self)
        if salient is not None and isinstance(bound, compose.Salient):
            bound, told = bound.fix(salient.score(problems[ALONE])), f"{self}, salient by {salient}"
        with torch.no_grad(), Meter(next(iter(problems.values())).W.device) as meter:
            problems, masks, weights, stats = self._solve_damped(problems, bound, processes)
        stats = {"time_s": meter.time_s, "mem_mib": meter.mem_mib, **stats}
        return conclude(problems, spec, masks, weights, told, stats)

    @abstractmethod
    def solve(self, problem: Problem, bound: Bound) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return the mask, the weight in the working dtype, and what there is to say."""

    def solve_coupled(
        self, problems: Problems, bound: CoupledPartition
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """Return the masks of all tensors, the weights of the leaders, and what there is to say.

        ``problems`` are those of the leaders.  As one problem along a diagonal, unless a solver knows better.
        """
        joint = join(problems, bound)
        mask, weight, stats = self.solve(joint.problem, joint.stage)
        return bound.scatter(joint.stage.gather(mask)), joint.split(weight), stats

    def _solve_damped(
        self, problems: Problems, bound: Bound | CoupledPartition, processes: ProcessGroup
    ) -> tuple[Problems, dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        while True:
            try:
                with processes.united():
                    if not isinstance(bound, CoupledPartition):
                        mask, weight, stats = over_rows(self.solve, problems[ALONE], bound, processes)
                        return problems, {ALONE: mask}, {ALONE: weight}, stats
                    return problems, *self.solve_coupled({name: problems[name] for name in bound.leaders}, bound)
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                problems = {name: p if p.H is None else p.damped_more() for name, p in problems.items()}


def conclude(
    problems: Problems,
    spec: Pattern,
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    solver: str,
    stats: dict[str, Any],
) -> dict[str, Solution]:
    """Check results, in the units of their problems, against their spec, and measure them.

    Of tensors without a new weight, the old one is masked.

    Raises SpecError if a mask breaks the spec, SolveError if a weight is not finite: both are faults of a solver,
    never of its input.
    """
    spec.check(masks if isinstance(spec, Coupled) else masks[ALONE])
    found = {}
    for name, problem in problems.items():
        weight = problem.restore(weights.get(name, problem.weight), masks[name])
        if not weight.isfinite().all():
            raise SolveError(
                f"{solver} on {spec} gave weights beyond the range of {problem.W.dtype} at damp = {problem.damp:g}: "
                "raise the damping, or prune in float32"
            )
        known = problem.H is not None
        error, error_test = (problem.error(weight), problem.error_test(weight)) if known else (None, None)
        told = {**stats, "damp": problem.damping} if known else stats
        found[name] = Solution(weight, masks[name], error, error_test, spec, solver, told)
    return found


def decide_rounds(problem: Problem, bound: Bound, decide: Decide) -> Tensor:
    """Return the mask (M, K) of a pattern whose rounds ``decide`` answers, salient blocks picked by their saliency."""
    return bound.resolve(decide, problem.saliency if isinstance(bound, compose.Salient) else problem.weight)


@dataclass(frozen=True)
class ScoreSolver(Solver):
    """A solver that keeps the blocks with the highest sums of element scores, and their weights as they are."""

    @abstractmethod
    def score(self, problem: Problem) -> Float[Tensor, "M K"]:
        """Return the worth of each weight on its own."""

    def solve(self, problem: Problem, bound: Bound) -> tuple[Tensor, Tensor, dict[str, Any]]:
        return bound.project(self.score(problem)), problem.weight, {}

    def solve_coupled(
        self, problems: Problems, bound: CoupledPartition
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        return bound.project({name: self.score(problem) for name, problem in problems.items()}), {}, {}
