"""The best weights on a given support."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from s3lab.errors import ShapeError, SolveError
from s3lab.shapes import Bool, Float
from s3lab.tensors.problem import Problem


class Fit(NamedTuple):
    """Weights (M, K), the steps they took, and the largest relative residual of a row."""

    weight: Tensor
    steps: int
    residual: float


@dataclass(frozen=True)
class Refit:
    """min tr (Ŵ−W) H (Ŵ−W)ᵀ over the Ŵ that are zero outside a mask, with the damped H.

    Conjugate gradients with H's diagonal as preconditioner, on all rows at once, each row with its own step lengths;
    a step is one M×K×K product.  Stops when ‖(Ŵ−W)H‖ on the support is below ``tolerance``·‖WH‖ for every row, or
    no row gains any more.  ``tolerance`` None means 1e-12 in float64 and 3e-4 in float32, which leaves the error
    within 1e-5 of its least.  Raises SolveError for options that cannot be, ShapeError for a mask that is not (M, K).

    Source: Hestenes and Stiefel, 1952; the use after pruning as in ALPS (Meng et al., 2024).

    With two inputs of correlation 1/2, the one that stays takes half of the other's weight:

    >>> problem = Problem(torch.ones(1, 2), torch.tensor([[1.0, 0.5], [0.5, 1.0]]), damp=0.0)
    >>> Refit()(problem, torch.tensor([[True, False]])).weight.tolist()
    [[1.5, 0.0]]
    """

    tolerance: float | None = None
    max_steps: int = 500

    def __post_init__(self) -> None:
        if self.max_steps < 1 or not (self.tolerance is None or self.tolerance > 0):
            raise SolveError(f"{self}: max_steps is at least 1 and tolerance, if given, above 0")

    def __call__(
        self,
        problem: Problem,
        mask: Bool[Tensor, "M K"],
        start: Float[Tensor, "M K"] | None = None,
        below: float = inf,
    ) -> Fit:
        """Return the best fit on ``mask``, from ``start`` (M, K) or the masked weight; ShapeError on another shape.

        Returns early where the undamped loss of the best fit, as `Problem.loss` has it, cannot be ``below`` that.
        """
        W0, H = problem.weight, problem.hessian
        if mask.shape != W0.shape:
            raise ShapeError(f"a mask of shape {tuple(mask.shape)} for a weight of shape {tuple(W0.shape)}")
        tolerance = self.tolerance or (1e-12 if problem.dtype == torch.float64 else 3e-4)
        support = mask.to(W0.dtype)
        W = (W0 if start is None else start.to(W0)) * support
        inverse_diagonal = 1 / H.diagonal()
        goal = tolerance * (W0 @ H).norm(dim=1, keepdim=True)
        apart = W0 - W
        slope = apart @ H
        outlook = None if below == inf else _Outlook(problem, float(torch.linalg.vecdot(slope, apart).sum()), below)
        residual = slope.mul_(support)
        scaled = residual * inverse_diagonal
        direction = scaled.clone()
        product = torch.linalg.vecdot(residual, scaled).unsqueeze(1)
        best, since = torch.inf, 0
        for step in range(self.max_steps + 1):
            gap = residual.norm(dim=1, keepdim=True)
            worst = problem.processes.max(float((gap / goal).nan_to_num(0).max()))
            best, since = (worst, 0) if worst < 0.9 * best else (best, since + 1)
            hopeless = outlook is not None and outlook.is_hopeless(W, product)
            if worst <= 1 or step == self.max_steps or since > 20 or hopeless:
                return Fit(W, step, worst * tolerance)
            image = (direction @ H).mul_(support)
            curvature = torch.linalg.vecdot(direction, image).unsqueeze(1)
            length = (product / curvature).nan_to_num_(0, 0, 0)
            W.addcmul_(length, direction)
            residual.addcmul_(length, image, value=-1)
            scaled = residual * inverse_diagonal
            product, before = torch.linalg.vecdot(residual, scaled).unsqueeze(1), product
            ratio = (product / before).nan_to_num_(0, 0, 0)
            direction.mul_(ratio).add_(scaled)
            if outlook is not None:
                outlook.advance(length, before, ratio)
        raise AssertionError("unreachable: the loop returns at max_steps")


class _Outlook:
    """How far the loss can still fall: the Gauss-Radau bound on the error of conjugate gradients, row by row.

    Needs a bound from below on the eigenvalues, which is what the damping adds, and takes no product.  Where the best
    fit is e away in the norm of H, its damped loss is lower by e²; the root of what the damping adds to a loss, and
    that of the undamped loss, are each at most e away from those of the best fit.

    Source: Golub and Meurant, *Matrices, Moments and Quadrature*, 1994; the recurrence, Meurant and Tichý, 2013.
    """

    def __init__(self, problem: Problem, loss: float, below: float) -> None:
        self.problem, self.below = problem, below
        self.loss = loss  # damped, of the rows here
        self.least = problem.ridge / float(problem.hessian.diagonal().max())  # eigenvalue, preconditioned
        self.reach = torch.full_like(problem.weight[:, :1], 1 / self.least if self.least else inf)

    def advance(self, length: Tensor, before: Tensor, ratio: Tensor) -> None:
        """Note a step: its ``length``, the product ``before`` it, and the ``ratio`` of that after it, (M, 1) each."""
        self.loss -= float((length * before).sum())
        beyond = (self.reach - length).clamp(min=0)
        self.reach = (beyond / (self.least * beyond + ratio)).nan_to_num(inf, inf)

    def is_hopeless(self, W: Tensor, product: Tensor) -> bool:
        """Whether the best fit loses too much for sure, by the weight and the preconditioned residual's square."""
        damped = self.problem.ridge * (self.problem.weight - W).square().sum()
        ahead = (self.reach * product).nan_to_num(0, inf).sum()
        here = damped.new_tensor(self.loss) - damped
        loss, damped, ahead = self.problem.processes.sum(torch.stack([here, damped, ahead])).clamp(min=0).tolist()
        least = max(loss - 2 * ahead - 2 * sqrt(damped * ahead), max(sqrt(loss) - sqrt(ahead), 0) ** 2)
        return least > self.below * (1 + 1e-3)
