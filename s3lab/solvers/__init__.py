"""Any solver on any spec: one literal dictionary, and the function that most users call."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from s3lab.algebra.patterns import parse
from s3lab.algebra.spec import Spec
from s3lab.errors import SolveError
from s3lab.shapes import Float
from s3lab.solvers.base import Solution, Solver, conclude
from s3lab.solvers.magnitude import Magnitude
from s3lab.solvers.obd import OBD
from s3lab.solvers.refit import Refit
from s3lab.solvers.sobs import SOBS
from s3lab.solvers.sparsegpt import SparseGPT
from s3lab.solvers.wanda import Wanda
from s3lab.tensors.meter import Meter
from s3lab.tensors.problem import Problem

SOLVERS: dict[str, type[Solver]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "obd": OBD,
    "sparsegpt": SparseGPT,
    "sobs": SOBS,
}


def make_solver(solver: str | Solver) -> Solver:
    """Return the solver of a name, with its default options, or the solver itself; SolveError for an unknown name."""
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise SolveError(
            f"no solver is called {solver!r}: use one of {', '.join(SOLVERS)}, or a Solver such as SOBS(batch=64)"
        )
    return SOLVERS[solver]()


def prune(
    W: Float[Tensor, "M K"],
    spec: Spec | str,
    H: Float[Tensor, "K K"] | None = None,
    solver: str | Solver = "sobs",
    *,
    H_test: Float[Tensor, "K K"] | None = None,
    damp: float = 1e-2,
    refit: bool = False,
) -> Solution:
    """Return the Solution of min tr (Ŵ−W)H(Ŵ−W)ᵀ over the Ŵ whose mask satisfies a spec, as a solver finds it.

    W (M, K) in any real dtype, on any device, is not touched; H (K, K) is the second moment of its inputs, of
    `hessian`, which only ``"magnitude"`` can do without; H_test, of other tokens, adds the held-out error.  ``damp``
    is added to the diagonal, as a fraction of its mean.  ``refit`` fits the kept weights exactly afterwards.

    Raises SpecError where the spec does not fit W, ShapeError for a W or H that is not finite or not of its shape,
    SolveError for an unknown solver or a missing H.

    >>> X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> solution = prune(torch.ones(4, 8), "2:4", X.T @ X / len(X), solver="obd")
    >>> solution.mask.sum(1).tolist()
    [4, 4, 4, 4]
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    problem = Problem(W, H, H_test, damp)
    solution = make_solver(solver)(problem, spec)
    if not refit:
        return solution
    with torch.no_grad(), Meter(W.device) as meter:
        problem = replace(problem, damp=solution.stats["damp"])
        fit = Refit()(problem, solution.mask)
    stats = {
        "time_s": solution.stats["time_s"] + meter.time_s,
        "refit_steps": fit.steps,
        "residual": fit.residual,
    }
    return conclude(
        problem,
        spec,
        solution.mask,
        fit.weight,
        f"{solution.solver} + {Refit()}",
        {**solution.stats, **stats},
    )
