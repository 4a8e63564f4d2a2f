"""Any solver on any spec: one literal dictionary, and the function that most users call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from s3lab.algebra.couple import Coupled
from s3lab.algebra.patterns import parse
from s3lab.algebra.spec import Pattern
from s3lab.errors import SolveError, SpecError
from s3lab.shapes import Float
from s3lab.solvers.admm import ADMM
from s3lab.solvers.base import ALONE, Problems, ScoreSolver, Solution, Solver, conclude
from s3lab.solvers.best import Best
from s3lab.solvers.damping import climb, measure_held_out
from s3lab.solvers.magnitude import Magnitude
from s3lab.solvers.obd import OBD
from s3lab.solvers.refine import Refine
from s3lab.solvers.refit import Refit
from s3lab.solvers.ria import RIA
from s3lab.solvers.sobs import SOBS
from s3lab.solvers.sparsegpt import SparseGPT
from s3lab.solvers.variance import MatchVariance as MatchVariance
from s3lab.solvers.wanda import Wanda
from s3lab.solvers.wrap import Wrap as Wrap
from s3lab.solvers.wrap import Wrapped
from s3lab.tensors.hessian import output_error
from s3lab.tensors.meter import Meter
from s3lab.tensors.problem import Problem, measure
from s3lab.tensors.processes import ProcessGroup, find_processes
from s3lab.tensors.shard import over_rows
from s3lab.tensors.units import shift

SOLVERS: dict[str, Callable[[], Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "obd": OBD,
    "sparsegpt": SparseGPT,
    "sobs": SOBS,
    "admm": ADMM,
    "best": lambda: Best(ADMM(), (Wanda(), Magnitude(), RIA(), OBD(), SparseGPT())),
}


def make_solver(solver: str | Solver) -> Solver:
    """Return the solver of a name, with its default options, or the solver itself; SolveError for an unknown name."""
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise SolveError(
            f"no solver is called {solver!r}: use one of {', '.join(SOLVERS)}, or a Solver such as SOBS(batch=64)"
        )
    return SOLVERS[solver]()


def make_score(score: str | Solver | None) -> ScoreSolver | None:
    """Return the solver of a name that scores each weight on its own; SolveError for one that does not score."""
    found = None if score is None else make_solver(score)
    if isinstance(found, ScoreSolver | None):
        return found
    names = ", ".join(name for name in SOLVERS if isinstance(make_solver(name), ScoreSolver))
    raise SolveError(f"salient = {score!r} gives weights no score of their own: use one of {names}")


@overload
def prune(
    W: Float[Tensor, "M K"],
    spec: Pattern | str,
    H: Float[Tensor, "K K"] | None = None,
    solver: str | Solver = "best",
    *,
    H_test: Float[Tensor, "K K"] | None = None,
    outputs: Float[Tensor, " M"] | None = None,
    damp: float | Literal["auto"] = 1e-2,
    refit: bool = False,
    refine: bool | Refine = False,
    salient: str | ScoreSolver | None = None,
    distributed: bool | ProcessGroup = False,
) -> Solution: ...
@overload
def prune(
    W: Mapping[str, Tensor],
    spec: Pattern | str,
    H: Mapping[str, Tensor] | None = None,
    solver: str | Solver = "best",
    *,
    H_test: Mapping[str, Tensor] | None = None,
    outputs: Mapping[str, Tensor] | None = None,
    damp: float | Literal["auto"] = 1e-2,
    refit: bool = False,
    refine: bool | Refine = False,
    salient: str | ScoreSolver | None = None,
    distributed: bool | ProcessGroup = False,
) -> dict[str, Solution]: ...
def prune(
    W: Tensor | Mapping[str, Tensor],
    spec: Pattern | str,
    H: Tensor | Mapping[str, Tensor] | None = None,
    solver: str | Solver = "best",
    *,
    H_test: Tensor | Mapping[str, Tensor] | None = None,
    outputs: Tensor | Mapping[str, Tensor] | None = None,
    damp: float | Literal["auto"] = 1e-2,
    refit: bool = False,
    refine: bool | Refine = False,
    salient: str | ScoreSolver | None = None,
    distributed: bool | ProcessGroup = False,
) -> Solution | dict[str, Solution]:
    """Return the Solution of min tr (Ŵ−W)H(Ŵ−W)ᵀ over the Ŵ whose mask satisfies a spec, as a solver finds it.

    The default is ADMM, unless the support of a score or of SparseGPT, with its exact weights, has a lower error: no
    one of them, refitted, is ahead of it.

    W (M, K) in any real dtype, on any device, is not touched; H (K, K) is the second moment of its inputs, of
    `hessian`, which only ``"magnitude"`` can do without; H_test, of other tokens, adds the held-out error.  ``outputs``
    (M,) says how much the squared error of each output counts, in what is least and in the errors: such as the mean
    squares of the loss's gradients by the outputs, the diagonal of K-FAC's G (Martens and Grosse, 2015).  It matters
    where rows compete: in scopes of several rows, and in couplings.  ``damp``
    is added to the diagonal, as a fraction of its mean; "auto" is the rung of `damping.LADDER` with the least held-out
    error.  ``refit`` fits the kept weights exactly afterwards; ``refine`` exchanges blocks as well, where that lowers
    the loss, with the options of a `Refine`.  ``salient`` names the score, such as "ria" or "wanda", that picks the
    salient blocks of ``8:16 plus 16:256`` and its kin for any solver; other patterns have no use for it.

    ``distributed`` shares the rows out to all processes of torch's default group, each of which makes this call and
    gets the same result, that of one process to rounding; patterns that tie all rows together, composed ones and
    couplings are solved by each in whole, and ``processes`` in the stats is 1.

    Under a coupling, W, H, H_test and outputs are such tensors by name, the sum over the leaders is what is least, and
    the result is a Solution by name; tensors that share their inputs are quickest with the same H.  Followers need no
    H.

    Raises SpecError where the spec does not fit W, ShapeError for a W or H that is not finite or not of its shape,
    SolveError for an unknown solver or score, or a missing H.

    >>> X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> solution = prune(torch.ones(4, 8), "2:4", X.T @ X / len(X), solver="obd")
    >>> solution.mask.sum(1).tolist()
    [4, 4, 4, 4]
    """
    spec = spec if isinstance(spec, Pattern) else parse(spec)
    pose = _read_layers(W, H, H_test, outputs)
    if not isinstance(refine, bool | Refine):
        raise SolveError(f"refine = {refine!r}: True, False, or a Refine with its options")
    method, processes, picker = make_solver(solver), find_processes(distributed), make_score(salient)

    def solve(damp: float) -> dict[str, Solution]:
        problems = pose(damp)
        found = method.prune(problems, spec, processes, picker)
        if refine:
            return _refine(problems, spec, found, Refine() if refine is True else refine, processes)
        return _refit(problems, spec, found, processes) if refit else found

    if damp != "auto":
        found = solve(damp)
    else:
        solved: dict[float, dict[str, Solution]] = {}
        with Meter(next(iter(pose(0.0).values())).W.device) as meter:
            tried = climb(lambda rung: processes.max(measure_held_out(solved.setdefault(rung, solve(rung)).values())))
        told = {"time_s": meter.time_s, "damps": tried}
        best = solved[min(tried, key=lambda rung: tried[rung])]
        found = {name: replace(solution, stats={**solution.stats, **told}) for name, solution in best.items()}
    if processes.size > 1:
        found = {name: _agree(solution, processes) for name, solution in found.items()}
    return found if isinstance(W, Mapping) else found[ALONE]


def wrap(
    W: Float[Tensor, "M K"],
    spec: Pattern | str,
    H: Float[Tensor, "K K"],
    solver: str | Solver = "admm",
    *,
    H_test: Float[Tensor, "K K"] | None = None,
    damp: float = 1e-2,
    outputs: Float[Tensor, " M"] | None = None,
    options: Wrap | None = None,
    block: int | None = None,
) -> Wrapped:
    """Return W ≈ A S B with block-diagonal A and B and a core S whose mask satisfies a spec, as `Wrap` finds it.

    From what ``solver`` finds, and never above its damped loss; H, H_test, ``damp`` and ``outputs`` are as in `prune`.
    ``options`` are those of the descent, ``block`` their size of a block alone.  A, S and B come in the dtype of W, and
    the errors are those of their product so rounded.  An output that counts nothing still counts a millionth of the
    largest.

    Raises ShapeError where blocks do not divide W, SpecError for a spec that does not fit or couples tensors, and
    SolveError as `prune` does.

    >>> X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> found = wrap(torch.eye(8), "1:4", X.T @ X / 64, block=2)
    >>> found.left.shape, found.mask.sum().item()
    (torch.Size([4, 2, 2]), 16)
    """
    spec = spec if isinstance(spec, Pattern) else parse(spec)
    if isinstance(spec, Coupled):
        raise SpecError(f"{spec} couples tensors: one weight is wrapped at a time")
    options = options or Wrap()
    options = options if block is None else replace(options, block=block)
    weighed = None if outputs is None else outputs.clamp(min=max(1e-6 * float(outputs.max()), 1e-30))
    method, problem = make_solver(solver), measure({ALONE: Problem(W, H, H_test, damp, weighed)})[ALONE]
    bound = spec.bind(problem.shape)
    with torch.no_grad(), Meter(W.device) as meter:
        mask, core, _ = method.solve(problem, bound)
        *_, (loss, parts) = options.descend(problem, core * mask, mask, lambda new: method.solve(new, bound)[0])
    # rows that count alike are those of A, whose core needs none of it
    left = parts.left if weighed is None else parts.left / weighed.sqrt().view(*parts.left.shape[:2], 1)
    core = shift(parts.core, problem.units.W)
    stats = {"damp": problem.damping, "time_s": meter.time_s, "mem_mib": meter.mem_mib, "loss": loss}
    found = Wrapped(left.to(W.dtype), core.to(W.dtype), parts.right.to(W.dtype), parts.mask, stats=stats)
    tested = None if H_test is None else output_error(found.dense, W, H_test, outputs)
    return replace(found, error=output_error(found.dense, W, H, outputs), error_test=tested)


def _read_layers(W: Any, H: Any, H_test: Any, outputs: Any) -> Callable[[float], dict[str, Problem]]:
    """Return what makes checked problems by name, at a damping, of the tensors that `prune` is given.

    Raises SolveError for a second moment or outputs without a weight, and for no weight at all.
    """
    weights, *rest = (dict(x if isinstance(x, Mapping) else {ALONE: x}) for x in (W, H, H_test, outputs))
    given = [name for some in rest for name, x in some.items() if x is not None]
    if unknown := [name for name in given if name not in weights]:
        told = ", ".join(str(name) or "no name" for name in unknown)
        raise SolveError(f"second moments or outputs of {told}, of which there is no weight: give both")
    if not weights:
        raise SolveError("no weights: give a tensor (M, K), or several by name under a coupling")

    def pose(damp: float) -> dict[str, Problem]:
        moments, tests, counts = rest
        return measure(
            {
                name: Problem(w, moments.get(name), tests.get(name), damp, counts.get(name))
                for name, w in weights.items()
            }
        )

    return pose


def _refine(
    problems: Problems, spec: Pattern, found: dict[str, Solution], refine: Refine, processes: ProcessGroup
) -> dict[str, Solution]:
    """Improve the support of a tensor's solution by local search, at the damping that was used."""
    if ALONE not in found:
        raise SolveError(f"{spec} couples tensors: local search takes one tensor at a time; leave refine off")
    first = found[ALONE]
    problem = replace(problems[ALONE], damp=first.stats["damp"])
    with torch.no_grad(), processes.united(), Meter(first.weight.device) as meter:
        mask, weight, told = over_rows(refine, problem, spec.bind(problem.shape), processes, first.mask)
    stats = {**first.stats, **told, "time_s": first.stats["time_s"] + meter.time_s}
    return conclude({ALONE: problem}, spec, {ALONE: mask}, {ALONE: weight}, f"{first.solver} + {refine}", stats)


def _refit(
    problems: Problems, spec: Pattern, found: dict[str, Solution], processes: ProcessGroup
) -> dict[str, Solution]:
    """Fit the kept weights of all tensors that have a say exactly, at the damping that was used."""

    def fit(problem: Problem, bound: object, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        fitted = Refit()(problem, mask)
        return mask, fitted.weight, {"refit_steps": fitted.steps, "residual": fitted.residual}

    first = next(iter(found.values()))
    with torch.no_grad(), processes.united(), Meter(first.weight.device) as meter:
        leaders = [n for n in found if not isinstance(spec, Coupled) or n not in spec.followers]
        fitted = {name: replace(problems[name], damp=found[name].stats["damp"]) for name in leaders}
        bound = None if isinstance(spec, Coupled) else spec.bind(first.weight.shape)
        fits = {name: over_rows(fit, fitted[name], bound, processes, found[name].mask) for name in leaders}
    stats = {
        **{key: value for key, value in first.stats.items() if key != "damp"},
        "time_s": first.stats["time_s"] + meter.time_s,
        **{key: max(told[key] for _, _, told in fits.values()) for key in ("refit_steps", "residual")},
    }
    masks = {name: solution.mask for name, solution in found.items()}
    weights = {name: weight for name, (_, weight, _) in fits.items()}
    return conclude({**problems, **fitted}, spec, masks, weights, f"{first.solver} + {Refit()}", stats)


def _agree(solution: Solution, processes: ProcessGroup) -> Solution:
    """What each process has solved in whole, or finished, is to the bit what the first one has."""
    mask, weight = processes.first(solution.mask), processes.first(solution.weight)
    return replace(solution, mask=mask, weight=weight, stats={"processes": 1, **solution.stats})
