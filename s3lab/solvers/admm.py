"""ADMM: the weight and its pruned copy are solved for apart, and drawn together until the support stands still."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.stage import Stage
from s3lab.errors import SolveError
from s3lab.solvers.base import Bound, Problems, Solver
from s3lab.solvers.fields import find_pieces
from s3lab.solvers.refit import Fit, Refit
from s3lab.tensors.problem import Problem

# effort: the first ρ, its growth, and the iterations at each ρ
_EFFORTS = {"quick": (0.1, 1.4, 3), "balanced": (0.07, 1.3, 3), "thorough": (0.07, 1.25, 9)}
_STILL = 1e-3  # of the mask: what changes at the end is of no account
_PATIENCE = 3  # iterations of that in a row
_TYPICAL = 6.0  # times the harmonic mean of H's eigenvalues, if below 1, is how much of ρ to start from
_PROBES = 64
_FIRM = 1e6  # times its score: what is held stays, but for others that are held


@dataclass(frozen=True)
class ADMM(Solver):
    """min tr (Ŵ−W)H(Ŵ−W)ᵀ with Ŵ = D, D on the pattern: ADMM for the support, then the exact fit on it.

    In units of unit diagonal of H, with the dual V,

        Ŵ ← (W H + ρD − V)(H + ρI)⁻¹,   D ← projection of Ŵ + V/ρ on the pattern,   V ← V + ρ(Ŵ − D),

    where the projection keeps the blocks of the largest norms.  ρ is held for some iterations, which share one
    Cholesky factor, and then raised; the loop ends when no more than 1 of 1,000 weights changes sides three times in a
    row, or ρ is above K, and so above all eigenvalues of H: then Ŵ is D in all that counts.  Of the pattern it uses the
    projection alone, and so takes any.

    Of two inputs that repeat each other either will do, and the loop, which decides them at once and alike, would go
    on taking both and dropping both.  So columns that another one nearly repeats take turns at random (seeded): with a
    probability of ``inertia``·r⁴, r the correlation, what is kept of them stays for an iteration.

    effort
        "quick", "balanced" or "thorough": how slowly ρ grows.  Slower growth finds a better support.
    rho, growth, hold
        in place of those of the effort: the first ρ, its growth, and the iterations at one ρ.  The first ρ is for
        blocks of one column and inputs that do not repeat each other; it is raised for wider blocks, and lowered with
        the harmonic mean of H's eigenvalues.
    inertia
        from 0, the iteration as it is written above, up to, but not at, 1.
    max_steps
        iterations after which the support is taken as it is.

    Cost: an M×K×K product an iteration, or two triangular solves where there are fewer rows than inputs, and a K×K
    Cholesky for each ρ; 11 to 57 and 4 to 19 of them with "balanced" on generated layers.  Raises SolveError for
    options that cannot be.
    Source: Boyd et al., *Distributed Optimization and Statistical Learning via ADMM*, 2011, section 9.1; with the fit
    at the end for pruning, Meng et al., *ALPS*, 2024.

    >>> import s3lab as s3
    >>> H = s3.hessian(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    >>> s3.prune(torch.ones(4, 8), "1:2@1x2", H, ADMM(effort="quick")).mask.sum().item()
    16
    """

    effort: Literal["quick", "balanced", "thorough"] = "balanced"
    rho: float | None = None
    growth: float | None = None
    hold: int | None = None
    inertia: float = 0.5
    max_steps: int = 500

    def __post_init__(self) -> None:
        if self.effort not in _EFFORTS:
            raise SolveError(f"{self}: effort is one of {', '.join(_EFFORTS)}")
        rho, growth, hold = self._schedule
        if not (rho > 0 and growth > 1 and hold >= 1 and self.max_steps >= 1):
            raise SolveError(f"{self}: rho is above 0, growth above 1, hold and max_steps at least 1")
        if not 0 <= self.inertia < 1:
            raise SolveError(f"{self}: inertia is a probability from 0 to below 1, such as 0.5")

    @property
    def _schedule(self) -> tuple[float, float, int]:
        given = zip((self.rho, self.growth, self.hold), _EFFORTS[self.effort], strict=True)
        rho, growth, hold = (default if own is None else own for own, default in given)
        return rho, growth, int(hold)

    def solve(self, problem: Problem, bound: Bound) -> tuple[Tensor, Tensor, dict[str, Any]]:
        stage = bound if isinstance(bound, Stage) else bound.first_part.stage(problem.weight)
        masks, weights, stats = self._iterate([problem], lambda scores: [bound.project(scores[0])], [stage])
        return masks[0], weights[0], stats

    def solve_coupled(
        self, problems: Problems, bound: CoupledPartition
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        masks: dict[str, Tensor] = {}

        def project(scores: list[Tensor]) -> list[Tensor]:
            masks.update(bound.project(dict(zip(problems, scores, strict=True))))
            return [masks[name] for name in problems]

        stages = [bound.parts[name].stage(problem.weight) for name, problem in problems.items()]
        _, weights, stats = self._iterate(list(problems.values()), project, stages)
        return masks, dict(zip(problems, weights, strict=True)), stats

    def _iterate(
        self, problems: list[Problem], project: Callable[[list[Tensor]], list[Tensor]], stages: list[Stage]
    ) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
        """Run the loop on problems whose supports are decided together; masks, weights, and what there is to say."""
        rho, growth, hold = self._schedule
        states = [_State(problem, rho, stage, self.inertia) for problem, stage in zip(problems, stages, strict=True)]
        processes = problems[0].processes
        allowed = _STILL * processes.total(sum(state.D.numel() for state in states))
        masks, changes, still, step = [torch.ones_like(state.D, dtype=torch.bool) for state in states], 0, 0, 0
        for step in range(1, self.max_steps + 1):
            if step > 1 and step % hold == 1 % hold:
                for state in states:
                    state.raise_rho(growth)
            before, masks = masks, project([state.advance() for state in states])
            for state, mask in zip(states, masks, strict=True):
                state.split(mask)
            changes = processes.total(sum(int((a ^ b).count_nonzero()) for a, b in zip(before, masks, strict=True)))
            still = still + 1 if changes <= allowed else 0
            if still == _PATIENCE or all(state.rho > len(state.H) for state in states):
                break
        fits = [state.fit(mask) for state, mask in zip(states, masks, strict=True)]
        stats = {
            "steps": step,
            "rho": states[0].rho,
            "changes": changes,
            "refit_steps": max(fit.steps for fit in fits),
            "residual": max(fit.residual for fit in fits),
        }
        return masks, [fit.weight for fit in fits], stats


class _State:
    """One problem's part of the loop, in units of unit diagonal: what is pulled towards H, and towards the pattern.

    ``D`` is the copy on the pattern, ``U`` the scaled dual V/ρ, and ``sum`` what D is projected from, Ŵ + U.
    ``pieces`` numbers the columns, those alike that blocks take together, and ``grip`` says how likely each piece is
    to stay as it is for an iteration.
    """

    def __init__(self, problem: Problem, rho: float, stage: Stage, inertia: float) -> None:
        self.problem = problem
        self.unit = problem.hessian.diagonal().sqrt()
        self.H = problem.hessian / self.unit / self.unit[:, None]
        self.D = problem.weight * self.unit
        self.U = torch.zeros_like(self.D)
        self.goal = self.D @ self.H
        self.kept = torch.zeros_like(self.D, dtype=torch.bool)
        self.pieces = find_pieces(stage)
        repeats = self.H.abs().masked_fill_(self.pieces == self.pieces[:, None], 0).amax(0)
        self.grip = repeats.new_zeros(len(repeats)).scatter_reduce_(0, self.pieces, inertia * repeats**4, "amax").cpu()
        self.random = torch.Generator().manual_seed(0)
        # where inputs nearly repeat each other, most directions of H are flat, and ρ must not hide what they say; wide
        # blocks take a little more of it in fewer iterations
        self._hold(rho * stage.width**0.25 * min(1.0, _TYPICAL * self._estimate_harmonic()))

    def _estimate_harmonic(self) -> float:
        """The harmonic mean of H's eigenvalues, by the trace of its inverse (Hutchinson, 1990)."""
        random = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (len(self.H), _PROBES), generator=random, device="cpu") * 2 - 1
        scaled = self.unit[:, None] * signs.to(self.unit)
        return scaled.numel() / float((scaled * self.problem.divide(scaled)).sum())

    def _hold(self, rho: float) -> None:
        self.rho = max(rho, len(self.H) * torch.finfo(self.H.dtype).eps)  # a lower one is lost in rounding
        shifted = self.H.clone()
        shifted.diagonal().add_(self.rho)
        self.factor = torch.linalg.cholesky(shifted)
        # products take half the time of triangular solves, which pays for an inverse where there are many rows; what
        # it loses in rounding moves the support of the loop and not the fit on it
        self.inverse = torch.cholesky_inverse(self.factor) if len(self.D) >= len(self.H) else None

    def raise_rho(self, growth: float) -> None:
        """Raise ρ and keep the dual V as it is, so that V/ρ shrinks."""
        self._hold(self.rho * growth)
        self.U /= growth

    def advance(self) -> Tensor:
        """Solve for Ŵ and return the scores that the pattern is chosen by: squares, and more for what is held."""
        pull = torch.sub(self.D, self.U).mul_(self.rho).add_(self.goal)
        if self.inverse is not None:
            self.sum = torch.addmm(self.U, pull, self.inverse)
        else:
            half = solve_triangular(self.factor, pull.T, upper=False)  # cholesky_solve would copy the factor each time
            self.sum = solve_triangular(self.factor.mT, half, upper=True).T.add_(self.U)
        scores = self.sum.square()
        held = (torch.rand(len(self.grip), generator=self.random, device="cpu") < self.grip).to(scores.device)
        columns = held[self.pieces].nonzero()[:, 0]
        scores[:, columns] *= torch.where(self.kept[:, columns], _FIRM, 1.0)
        return scores

    def split(self, mask: Tensor) -> None:
        """Let D be the sum on the support, and the scaled dual U + Ŵ − D, which is the sum off it."""
        self.kept = mask
        self.D = self.sum * mask
        self.U = self.sum.sub_(self.D)

    def fit(self, mask: Tensor) -> Fit:
        return Refit()(self.problem, mask, start=self.D / self.unit)
