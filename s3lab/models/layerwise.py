"""Pruning the matrices of one decoder layer, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from torch import Tensor

from s3lab.errors import S3Error, SolveError
from s3lab.models.decoder import Matrix, Stage, find_stages
from s3lab.models.flow import Flow
from s3lab.models.jobs import Job
from s3lab.solvers import prune
from s3lab.solvers.base import ScoreSolver, Solution, Solver
from s3lab.tensors.hessian import Moment
from s3lab.tensors.team import Team

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
    hessians: str = "pruned"
    scarce: float | None = None
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.hessians not in ("pruned", "dense"):
            raise SolveError(f"hessians = {self.hessians!r}: take those of the 'pruned' or of the 'dense' model")

    @property
    def total(self) -> int:
        """How many matrices there are to prune."""
        return sum(len(job.matrices) for jobs in self.jobs for job in jobs)


def prune_layer(
    flow: Flow, index: int, recipe: Recipe, tell: Callable[[str, float | None], None]
) -> list[dict[str, Any]]:
    """Prune the matrices of layer ``index`` in place, and return a row for each, in the order they were pruned in.

    The layer is dense and on the device of the flow, whose dense stream goes through it first.  ``tell`` hears the
    name and error of each matrix.
    """
    rows: list[dict[str, Any]] = []
    jobs = {matrix.name: job for job in recipe.jobs[index] for matrix in job.leaders.values()}
    given: dict[str, _Shared] = {}
    stages = _find_stages(flow, index, recipe)
    early = [_collect(flow, index, "dense", stage) for stage in stages] if recipe.hessians == "dense" else []
    flow.advance_dense(index)
    for number, stage in enumerate(stages):
        moments = early[number] if early else _collect(flow, index, "pruned", stage)
        for group, (train, test) in zip(stage.groups, moments, strict=True):
            H, H_test = (moment.value() if moment.tokens else None for moment in (train, test))
            shared = _Shared(H, H_test, train.tokens, train.tokens >= flow.tokens)
            for matrix in group:
                given[matrix.name], job = shared, jobs[matrix.name]
                names = [leader.name for leader in job.leaders.values()]
                if not given.keys() >= set(names):
                    continue
                with _naming(" & ".join(names)):
                    figures = _prune_together(job, [given.pop(name) for name in names], recipe, flow.team)
                for found, row in zip(job.matrices.values(), figures, strict=True):
                    name = found.name.removeprefix(f"{flow.decoder.name}.{index}.")
                    rows.append({"layer": index, "name": name, **row})
                    tell(name, row["error"])
    return rows


@dataclass(frozen=True)
class _Shared:
    """What is known of an input: its second moments, its tokens, and whether these are all there are."""

    H: Tensor | None
    H_test: Tensor | None
    tokens: int
    all_tokens: bool


def _find_stages(flow: Flow, index: int, recipe: Recipe) -> list[Stage]:
    """The stages of a layer with only the matrices to measure in them, those of a job in the last stage of any.

    A single one where no input will change.
    """
    matrices, (chunk, hidden) = flow.decoder.matrices[index], flow.sample(index)
    hidden = hidden.requires_grad_()
    # a layer may write into what it is given, which a leaf forbids
    stages = find_stages(matrices, lambda: flow.run(index, chunk, hidden.clone()), chunk.ids.numel())
    at = {matrix.name: number for number, stage in enumerate(stages) for group in stage.groups for matrix in group}
    due: dict[str, int] = {}
    for job in recipe.jobs[index]:
        names = [matrix.name for matrix in job.leaders.values()]
        due |= dict.fromkeys(names, max(at[name] for name in names) if recipe.hessians == "pruned" else 0)
    kept = []
    for number in range(len(stages)):
        parts = [
            (stage.once, found)
            for stage in stages
            for group in stage.groups
            if (found := tuple(matrix for matrix in group if due.get(matrix.name) == number))
        ]
        if parts:
            kept.append(Stage(tuple(group for _, group in parts), all(once for once, _ in parts)))
    return kept


def _collect(flow: Flow, index: int, stream: str, stage: Stage) -> list[tuple[Moment, Moment]]:
    """The second moments of the inputs of a stage's groups, of the calibration and of the held-out sequences."""
    watched = {group[0].name: group[0] for group in stage.groups}
    moments = {name: (Moment(), Moment()) for name in watched}

    def see(matrix: Matrix, x: Tensor, held_out: bool) -> None:
        with _naming(matrix.name):
            moments[matrix.name][held_out].add(x)

    flow.watch(index, stream, watched, see, calls=len(watched) if stage.once else None)
    for moment in chain.from_iterable(moments.values()):
        moment.pool(flow.team, flow.device)
    return list(moments.values())


def _prune_together(job: Job, given: Sequence[_Shared], recipe: Recipe, team: Team) -> list[dict[str, Any]]:
    """Prune a job's matrices in place, or leave them dense if one saw too few tokens, and return a row for each.

    All processes of the team do so together.  ``given`` is what is known of the leaders' inputs, in order.
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
    if damp is None or not all(inputs[name].tokens for name in short):
        damp, figures = recipe.damp, dict.fromkeys(W, _UNTOUCHED)
        notes = dict.fromkeys(W, f"{', '.join(short.values())}: left dense")
    else:
        moments = {name: shared.H for name, shared in inputs.items() if shared.H is not None}
        tests = {name: shared.H_test for name, shared in inputs.items() if shared.H_test is not None}
        options: dict[str, Any] = {"refit": recipe.refit, "refine": recipe.refine, "salient": recipe.salient}
        found = prune(W, job.spec, moments, solver, H_test=tests, damp=damp, distributed=team, **options)
        figures = {name: _measure(solution, W[name]) for name, solution in found.items()}
        # the time is that of all together, told once
        figures |= {name: {**figures[name], "time_s": 0.0} for name in W if name != next(iter(inputs))}
        notes |= {name: f"{told}: damping {damp:g}" for name, told in short.items()}
        for name, solution in found.items():
            W[name].copy_(solution.weight)
    return [
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


def _measure(solution: Solution, W: Tensor) -> dict[str, Any]:
    stats = {key: solution.stats[key] for key in ("damp", "time_s", "mem_mib") if key in solution.stats}
    return {
        "solver": solution.solver,
        "error": solution.error,
        "error_test": solution.error_test,
        "weight_error": _distance(solution.weight, W),
        "density": float(solution.mask.double().mean()),
        **stats,
    }


def _distance(W_hat: Tensor, W: Tensor) -> float:
    size = W.double().norm()
    return float((W_hat.double() - W.double()).norm() / size) if size else 0.0


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the name of a matrix before what is wrong with it."""
    try:
        yield
    except S3Error as error:
        raise type(error)(f"{name}: {error}") from error
