"""Pruning the matrices of one decoder layer, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from s3lab.errors import SolveError
from s3lab.models.prune.flow import Flow
from s3lab.models.prune.jobs import Job
from s3lab.models.prune.measured import Measured, Moments, find_own_course, naming
from s3lab.models.prune.passage import Passage
from s3lab.models.structure.decoder import Course, Decoder, Stage
from s3lab.solvers import prune, wrap
from s3lab.solvers.base import ScoreSolver, Solution, Solver
from s3lab.solvers.wrap import Wrap, Wrapped
from s3lab.tensors.processes import ProcessGroup

_UNTOUCHED = {"error": None, "error_test": None, "weight_error": 0.0, "density": 1.0, "time_s": 0.0, "mem_mib": None}


@dataclass(frozen=True)
class Recipe:
    """What is done to which matrices: the jobs of each layer, the solver of each matrix by full name, and options.

    Of matrices that are pruned together, the solver of the first leader counts.
    """

    jobs: Sequence[Sequence[Job]]
    solvers: Mapping[str, Solver]
    damp: float | Literal["auto"] = 1e-2
    refit: bool = False
    refine: bool = False
    salient: ScoreSolver | None = None
    wrap: Wrap | None = None
    hessians: str = "pruned"
    hessian: str = "inputs"
    scarce: float | None = None
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.hessians not in ("pruned", "dense"):
            raise SolveError(f"hessians = {self.hessians!r}: take those of the 'pruned' or of the 'dense' model")
        if self.hessian not in ("inputs", "loss"):
            raise SolveError(f"hessian = {self.hessian!r}: take that of the 'inputs' alone, or weighted by the 'loss'")
        if self.wrap and (self.damp == "auto" or self.refit or self.refine or self.salient):
            raise SolveError("a wrapped core has one damping, and no refit, refine or salient score: leave those off")

    @property
    def total(self) -> int:
        """How many matrices there are to prune."""
        return sum(len(job.matrices) for jobs in self.jobs for job in jobs)


@dataclass
class Pruned:
    """What became of a layer's matrices: a row for each, in the order they were pruned in, and those that are wrapped.

    These are by full name.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    wrapped: dict[str, Wrapped] = field(default_factory=dict)


def prune_layer(
    flow: Flow, index: int, recipe: Recipe, tell: Callable[[str, float | None], None]
) -> tuple[Pruned, dict[str, float | None]]:
    """Prune the matrices of layer ``index`` in place and send both streams through it.

    Returns what became of them, and how far the streams are apart behind the layer, as `Flow.advance_pruned` does.
    The layer is dense and on the device of the flow, whose dense stream goes first.  ``tell`` hears the name
    and error of each matrix.
    """
    pruner = _Pruner(flow.decoder, index, recipe, flow.processes, tell)
    course = find_own_course(flow, index)
    due = _find_due(course, recipe.jobs[index])
    stages = _regroup(course, due if recipe.hessians == "pruned" else dict.fromkeys(due, 0))
    dense = Moments(flow, stages if recipe.hessians == "dense" else ())
    flow.advance_dense(index, dense.leaders, dense.see if dense.leaders else None)
    passage = Passage(
        flow, index, course, () if dense.leaders else stages, _find_final(course, recipe.jobs[index], due)
    )
    for number, stage in enumerate(stages):
        moments = dense
        if not dense.leaders:
            moments = Moments(flow, (stage,))
            passage.watch(number, moments.see)
        for group, found in zip(stage.groups, moments.pool(), strict=True):
            pruner.take([matrix.name for matrix in group], found)
    return pruner.pruned, flow.advance_pruned(index, passage.leave)


def prune_measured(
    decoder: Decoder,
    index: int,
    measured: Mapping[tuple[str, ...], Measured],
    recipe: Recipe,
    processes: ProcessGroup,
    tell: Callable[[str, float | None], None],
) -> Pruned:
    """Prune the matrices of layer ``index`` in place by what `measure_layer` found."""
    pruner = _Pruner(decoder, index, recipe, processes, tell)
    for names, found in measured.items():
        pruner.take(names, found)
    return pruner.pruned


class _Pruner:
    """Prunes each job of a layer as soon as the inputs of all that lead in it are known."""

    def __init__(
        self,
        decoder: Decoder,
        index: int,
        recipe: Recipe,
        processes: ProcessGroup,
        tell: Callable[[str, float | None], None],
    ) -> None:
        self.pruned = Pruned()
        self._index, self._head, self._recipe, self._processes, self._tell = (
            index,
            f"{decoder.name}.{index}.",
            recipe,
            processes,
            tell,
        )
        self._jobs = {matrix.name: job for job in recipe.jobs[index] for matrix in job.leaders.values()}
        self._given: dict[str, Measured] = {}

    def take(self, names: Iterable[str], found: Measured) -> None:
        """Hear what is known of the input that the named matrices share."""
        for name in names:
            job = self._jobs.get(name)
            if job is None:
                continue
            self._given[name] = found
            leaders = [leader.name for leader in job.leaders.values()]
            if not self._given.keys() >= set(leaders):
                continue
            with naming(" & ".join(leaders)):
                figures, wrapped = _prune_together(
                    job, [self._given.pop(name) for name in leaders], self._recipe, self._processes
                )
            self.pruned.wrapped |= {job.matrices[key].name: own for key, own in wrapped.items()}
            for matrix, row in zip(job.matrices.values(), figures, strict=True):
                name = matrix.name.removeprefix(self._head)
                self.pruned.rows.append({"layer": self._index, "name": name, **row})
                self._tell(name, row["error"])


def _find_due(course: Course, jobs: Sequence[Job]) -> dict[str, int]:
    """At which stage the inputs of each matrix that leads are measured: the last of those of its job."""
    at = _number(course)
    due: dict[str, int] = {}
    for job in jobs:
        names = [matrix.name for matrix in job.leaders.values()]
        due |= dict.fromkeys(names, max(at[name] for name in names))
    return due


def _find_final(course: Course, jobs: Sequence[Job], due: Mapping[str, int]) -> set[str]:
    """The matrices that are as they will be once their own stage is pruned."""
    at = _number(course)
    late = {
        matrix.name
        for job in jobs
        for matrix in job.matrices.values()
        if at[matrix.name] < max(due[leader.name] for leader in job.leaders.values())
    }
    return at.keys() - late


def _number(course: Course) -> dict[str, int]:
    return {matrix.name: n for n, stage in enumerate(course.stages) for group in stage.groups for matrix in group}


def _regroup(course: Course, due: Mapping[str, int]) -> list[Stage]:
    """The stages of a layer with only the matrices to measure in them, each in the stage at which it is due."""
    kept = []
    for number in range(len(course.stages)):
        parts = [
            (stage.once, found)
            for stage in course.stages
            for group in stage.groups
            if (found := tuple(matrix for matrix in group if due.get(matrix.name) == number))
        ]
        if parts:
            kept.append(Stage(tuple(group for _, group in parts), all(once for once, _ in parts)))
    return kept


def _prune_together(
    job: Job, given: Sequence[Measured], recipe: Recipe, processes: ProcessGroup
) -> tuple[list[dict[str, Any]], dict[str, Wrapped]]:
    """Prune a job's matrices in place, or leave them dense if one saw too few tokens.

    Returns a row for each, and those that are wrapped by the names that their spec has.  All processes of the group do
    so together.  ``given`` is what is known of the leaders' inputs, in order.
    """
    W = {name: matrix.weight for name, matrix in job.matrices.items()}
    inputs = dict(zip(job.leaders, given, strict=True))
    solver = recipe.solvers[job.matrices[next(iter(inputs))].name]
    notes = {name: "" if name in inputs else f"follows {', '.join(inputs)}" for name in W}
    short = {}
    for name, shared in inputs.items():
        need = W[name].shape[1] if recipe.min_tokens is None else recipe.min_tokens
        if not shared.all_tokens and shared.tokens < need:
            short[name] = f"{shared.tokens} tokens, fewer than {need}"
    damp = recipe.scarce if short else recipe.damp
    wrapped: dict[str, Wrapped] = {}
    if damp is None or not all(inputs[name].tokens for name in short):
        damp, figures = recipe.damp, dict.fromkeys(W, _UNTOUCHED)
        notes = dict.fromkeys(W, f"{', '.join(short.values())}: left dense")
    else:
        moments = {name: shared.H for name, shared in inputs.items() if shared.H is not None}
        tests = {name: shared.H_test for name, shared in inputs.items() if shared.H_test is not None}
        outputs = {name: shared.outputs for name, shared in inputs.items() if shared.outputs is not None}
        options: dict[str, Any] = {"refit": recipe.refit, "refine": recipe.refine, "salient": recipe.salient}
        found: Mapping[str, Solution | Wrapped]
        if recipe.wrap and damp != "auto":
            name = next(iter(inputs))
            found = wrapped = {
                name: wrap(
                    W[name],
                    job.spec,
                    moments[name],
                    solver,
                    H_test=tests.get(name),
                    outputs=outputs.get(name),
                    damp=damp,
                    options=recipe.wrap,
                )
            }
            notes[name] = f"a core wrapped by blocks of {recipe.wrap.block}, stored as their product"
        else:
            found = prune(
                W,
                job.spec,
                moments,
                solver,
                H_test=tests,
                outputs=outputs,
                damp=damp,
                distributed=processes,
                **options,
            )
        figures = {name: _measure(solution, W[name], solver) for name, solution in found.items()}
        # the time is that of all together, told once
        figures |= {name: {**figures[name], "time_s": 0.0} for name in W if name != next(iter(inputs))}
        notes |= {name: f"{told}: damping {damp:g}" for name, told in short.items()}
        for name, solution in found.items():
            W[name].copy_(solution.dense if isinstance(solution, Wrapped) else solution.weight)
    rows = [
        {
            "shape": list(w.shape),
            "spec": str(job.spec),
            "solver": repr(solver),
            "damp": damp,
            **figures[name],
            "tokens": inputs[name].tokens if name in inputs else None,
            "note": notes[name],
        }
        for name, w in W.items()
    ]
    return rows, wrapped


def _measure(solution: Solution | Wrapped, W: Tensor, solver: Solver) -> dict[str, Any]:
    stats = {key: solution.stats[key] for key in ("damp", "time_s", "mem_mib") if key in solution.stats}
    wrapped = isinstance(solution, Wrapped)
    return {
        "solver": repr(solver) if wrapped else solution.solver,
        "error": solution.error,
        "error_test": solution.error_test,
        "weight_error": _distance(solution.dense if wrapped else solution.weight, W),
        **({"extra": solution.extra} if wrapped else {}),
        "density": float(solution.mask.double().mean()),
        **stats,
    }


def _distance(W_hat: Tensor, W: Tensor) -> float:
    size = W.double().norm()
    return float((W_hat.double() - W.double()).norm() / size) if size else 0.0
