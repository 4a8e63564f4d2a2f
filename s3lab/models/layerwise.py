"""Pruning the matrices of one decoder layer, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from s3lab.algebra.patterns import parse
from s3lab.algebra.spec import Spec
from s3lab.errors import S3Error, SolveError, SpecError
from s3lab.models.decoder import Decoder, Matrix, Stage, find_stages
from s3lab.models.flow import Flow
from s3lab.models.globs import assign
from s3lab.solvers import prune
from s3lab.solvers.base import Solver
from s3lab.tensors.hessian import Moment

DENSE = "dense"


@dataclass(frozen=True)
class Recipe:
    """What is done to which matrix: a spec and a solver by full name, those left dense not among them, and options."""

    specs: Mapping[str, Spec]
    solvers: Mapping[str, Solver]
    damp: float = 1e-2
    refit: bool = False
    hessians: str = "pruned"
    scarce: float | None = None
    min_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.hessians not in ("pruned", "dense"):
            raise SolveError(f"hessians = {self.hessians!r}: take those of the 'pruned' or of the 'dense' model")


def choose(decoder: Decoder, table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each matrix by a table of globs, over names with or without what precedes the layers."""
    head, dot, _ = decoder.name.rpartition(".")
    return assign([name for matrices in decoder.matrices for name in matrices], table, root=head + dot)


def choose_specs(decoder: Decoder, table: Mapping[str, str | Spec]) -> dict[str, Spec]:
    """Return the spec of each matrix by a table of globs, those that stay "dense" left out.

    Raises SpecError for a spec that does not fit its matrix, or where nothing is left to prune.
    """
    texts = {name: spec for name, spec in choose(decoder, table).items() if spec != DENSE}
    if not texts:
        raise SpecError("all matrices are to stay dense: give a spec for some of them")
    specs = {name: parse(spec) if isinstance(spec, str) else spec for name, spec in texts.items()}
    for matrices in decoder.matrices:
        for name, matrix in matrices.items():
            if name in specs:
                with _naming(name):
                    specs[name].bind((matrix.weight.shape[0], matrix.weight.shape[1]))
    return specs


def prune_layer(
    flow: Flow, index: int, recipe: Recipe, tell: Callable[[str, float | None], None]
) -> list[dict[str, Any]]:
    """Prune the matrices of layer ``index`` in place, and return a row for each, in the order they were pruned in.

    The layer is dense and on the device of the flow, whose dense stream goes through it first.  ``tell`` hears the
    name and error of each matrix.
    """
    rows, prefix = [], f"{flow.decoder.name}.{index}."
    stages = _find_stages(flow, index, recipe)
    early = [_collect(flow, index, "dense", stage) for stage in stages] if recipe.hessians == "dense" else []
    flow.advance_dense(index)
    for number, stage in enumerate(stages):
        moments = early[number] if early else _collect(flow, index, "pruned", stage)
        for group, (train, test) in zip(stage.groups, moments, strict=True):
            H, H_test = (moment.value() if moment.tokens else None for moment in (train, test))
            for matrix in group:
                problem = _Shared(H, H_test, train.tokens, train.tokens >= flow.tokens)
                with _naming(matrix.name):
                    figures = _prune_matrix(matrix, problem, recipe)
                name = matrix.name.removeprefix(prefix)
                rows.append({"layer": index, "name": name, **figures})
                tell(name, figures["error"])
    return rows


@dataclass(frozen=True)
class _Shared:
    """What is known of an input: its second moments, its tokens, and whether these are all there are."""

    H: Tensor | None
    H_test: Tensor | None
    tokens: int
    all_tokens: bool


def _find_stages(flow: Flow, index: int, recipe: Recipe) -> list[Stage]:
    """The stages of a layer with only the matrices to prune in them, a single one where no input will change."""
    matrices, chunk = flow.decoder.matrices[index], flow.chunks[0]
    hidden = flow.get(index, "pruned", chunk).requires_grad_()
    # a layer may write into what it is given, which a leaf forbids
    stages = find_stages(matrices, lambda: flow.run(index, chunk, hidden.clone()), chunk.ids.numel())
    kept = []
    for stage in stages:
        groups = [tuple(matrix for matrix in group if matrix.name in recipe.specs) for group in stage.groups]
        kept.append(Stage(tuple(group for group in groups if group), stage.once))
    if recipe.hessians == "dense":
        kept = [Stage(tuple(group for stage in kept for group in stage.groups), once=False)]
    return [stage for stage in kept if stage.groups]


def _collect(flow: Flow, index: int, stream: str, stage: Stage) -> list[tuple[Moment, Moment]]:
    """The second moments of the inputs of a stage's groups, of the calibration and of the held-out sequences."""
    watched = {group[0].name: group[0] for group in stage.groups}
    moments = {name: (Moment(), Moment()) for name in watched}

    def see(matrix: Matrix, x: Tensor, held_out: bool) -> None:
        with _naming(matrix.name):
            moments[matrix.name][held_out].add(x)

    flow.watch(index, stream, watched, see, calls=len(watched) if stage.once else None)
    return list(moments.values())


def _prune_matrix(matrix: Matrix, given: _Shared, recipe: Recipe) -> dict[str, Any]:
    """Prune one matrix in place, or leave it dense if it saw too few tokens, and return its figures."""
    W, spec, solver = matrix.weight, recipe.specs[matrix.name], recipe.solvers[matrix.name]
    row = {"shape": list(W.shape), "spec": str(spec), "solver": repr(solver), "damp": recipe.damp}
    need = W.shape[1] if recipe.min_tokens is None else recipe.min_tokens
    few = not given.all_tokens and given.tokens < need
    if few and (recipe.scarce is None or not given.tokens):
        note = f"{given.tokens} tokens, fewer than {need}: left dense"
        same = {"error": None, "error_test": None, "weight_error": 0.0, "density": 1.0}
        return {**row, **same, "time_s": 0.0, "mem_mib": None, "tokens": given.tokens, "note": note}
    damp, note = recipe.damp, ""
    if few and recipe.scarce is not None:
        damp, note = recipe.scarce, f"{given.tokens} tokens, fewer than {need}: damping {recipe.scarce:g}"
    solution = prune(W, spec, given.H, solver, H_test=given.H_test, damp=damp, refit=recipe.refit)
    figures = {
        "solver": solution.solver,
        "damp": solution.stats.get("damp", damp),
        "error": solution.error,
        "error_test": solution.error_test,
        "weight_error": _distance(solution.weight, W),
        "density": float(solution.mask.double().mean()),
        "time_s": solution.stats["time_s"],
        "mem_mib": solution.stats["mem_mib"],
    }
    W.copy_(solution.weight)
    return {**row, **figures, "tokens": given.tokens, "note": note}


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
