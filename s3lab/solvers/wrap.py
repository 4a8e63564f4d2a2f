"""A sparse core between two block-diagonal matrices: what a mask can't say, they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from s3lab.errors import ShapeError, SolveError
from s3lab.shapes import Bool, Float
from s3lab.tensors.problem import Problem
from s3lab.tensors.wraps import Wraps, to_left, to_right

_MORE = 3  # times the steps, for the values of a mask that is new: too few, and no new one is ever taken
Decide = Callable[[Problem], Tensor]  # a mask (M, K) for a problem


@dataclass(frozen=True, eq=False)
class Wrapped:
    """W ≈ A S B: ``left`` are the blocks of A (M/b, b, b), ``core`` is S (M, K), ``right`` the blocks of B (K/b, b, b).

    ``mask`` is what the core keeps, ``error`` and ``error_test`` are those of `dense`, as in a Solution, and ``extra``
    is how many numbers A and B hold, as a share of those of W.  Made by `wrap`, which raises
    ShapeError and its kin for what cannot be wrapped.

    >>> import s3lab as s3
    >>> found = s3.wrap(torch.eye(8) + 0.5, "2:4", torch.eye(8), block=4)
    >>> found.left.shape, found.dense.shape, found.extra, found.error < s3.prune(found.dense, "2:4", torch.eye(8)).error
    (torch.Size([2, 4, 4]), torch.Size([8, 8]), 1.0, True)
    """

    left: Float[Tensor, "m b b"]
    core: Float[Tensor, "M K"]
    right: Float[Tensor, "k b b"]
    mask: Bool[Tensor, "M K"]
    error: float | None = None
    error_test: float | None = None
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def dense(self) -> Float[Tensor, "M K"]:
        """A S B, in the dtype of the core."""
        return self.wraps.around(self.core)

    @property
    def extra(self) -> float:
        """How many numbers A and B hold, as a share of those of the weight."""
        return self.wraps.numbers / self.core.numel()

    def to(self, like: Tensor) -> Wrapped:
        """Return the same in the dtype and on the device of a tensor, its errors left out."""
        left, core, right = (part.to(like) for part in (self.left, self.core, self.right))
        return Wrapped(left, core, right, self.mask.to(core.device))

    @property
    def wraps(self) -> Wraps:
        """A and B."""
        return Wraps(self.left, self.right)


@dataclass(frozen=True)
class Wrap:
    """min tr (W − A S B) H (W − A S B)ᵀ over block-diagonal A and B and a core S whose mask satisfies the pattern.

    From the core that a solver finds, with A and B the identity, each of A, B and S becomes in turn the best that it
    can be while the others stay: A by normal equations, one block of rows at a time, B and the kept values of S by
    ``steps`` of conjugate gradients, preconditioned by the blocks, and by the diagonal.  Every ``renew`` sweeps the
    solver chooses the mask anew, for the weight A⁻¹ W B⁻¹ under B H Bᵀ, which leaves out how A ties rows together; its
    values need more steps, and it is taken where it ends lower.  H is damped, and no step raises what is minimised.

    block
        rows and columns of a block of A and B; divides M and K.
    sweeps
        rounds of A, B and S.

    Cost: some 2·steps M×K×K products a sweep, and for each new mask a solve and four times as many.  Raises SolveError
    for options that cannot be.

    Source: ARMOR, 2025, which descends by Adam and moves the mask by sums of 2:4 choices; here each part is solved for,
    and the pattern is any.

    >>> Wrap(block=16).sweeps
    8
    """

    block: int = 8
    sweeps: int = 8
    steps: int = 6
    renew: int = 2

    def __post_init__(self) -> None:
        if min(self.block, self.sweeps, self.steps, self.renew) < 1:
            raise SolveError(f"{self}: block, sweeps, steps and renew are at least 1")

    def descend(self, problem: Problem, core: Tensor, mask: Tensor, decide: Decide) -> Iterator[tuple[float, _Parts]]:
        """Yield the damped loss and the parts, at the start and after each step, from a core and its mask."""
        M, K = problem.shape
        if M % self.block or K % self.block:
            raise ShapeError(f"blocks of {self.block} do not divide a weight of {M}×{K}: give a divisor of both")
        one = torch.eye(self.block, dtype=core.dtype, device=core.device)
        parts = _Parts(
            problem, one.repeat(M // self.block, 1, 1), core, one.repeat(K // self.block, 1, 1), mask, self.steps
        )
        least = parts.loss
        yield least, parts
        for sweep in range(1, self.sweeps + 1):
            for name in ("left", "right", "core"):
                tried = getattr(parts, f"fit_{name}")()
                if tried.loss <= least:  # rounding may raise it by a little: then it is as good as it gets
                    parts, least = tried, tried.loss
                yield least, parts
            if sweep % self.renew == 0:
                tried = parts.renew(decide)
                if tried is not None and tried.loss < least:
                    parts, least = tried, tried.loss
                yield least, parts


@dataclass(frozen=True, eq=False)
class _Parts:
    """A, S and B under way, in the units of a problem."""

    problem: Problem
    left: Tensor
    core: Tensor
    right: Tensor
    mask: Tensor
    steps: int

    @property
    def dense(self) -> Tensor:
        return to_right(to_left(self.left, self.core), self.right)

    @property
    def loss(self) -> float:
        """The damped loss."""
        apart = self.problem.weight - self.dense
        return float((apart @ self.problem.hessian * apart).sum(dtype=torch.float64))

    def fit_left(self) -> _Parts:
        """A_I = W_I H Z_Iᵀ (Z_I H Z_Iᵀ)⁻¹ with Z = S B, for each block of rows I."""
        Z = to_right(self.core, self.right)
        block = self.left.shape[1]
        rows = Z.view(-1, block, Z.shape[1])
        weighed = (Z @ self.problem.hessian).view_as(rows)
        square = (weighed @ rows.mT).double()
        goal = weighed @ self.problem.weight.view_as(rows).mT
        found = torch.linalg.lstsq(square, goal.double()).solution.mT
        return replace(self, left=found.to(self.left))

    def fit_right(self) -> _Parts:
        """Lower the loss in B = diag(B_J) by conjugate gradients: with T = A S, Σ_J T_JᵀT B H restricted to blocks."""
        T, H, block = to_left(self.left, self.core), self.problem.hessian, self.right.shape[1]
        columns = T.view(len(T), -1, block).transpose(0, 1)  # (k, M, b)
        squares = columns.mT @ columns
        diagonal = torch.stack([H[i : i + block, i : i + block] for i in range(0, len(H), block)])

        def restrict(x: Tensor) -> Tensor:
            return columns.mT @ x.view(len(x), -1, block).transpose(0, 1)

        found = _descend(
            self.right,
            restrict((self.problem.weight - to_right(T, self.right)) @ H),
            lambda d: restrict(to_right(T, d) @ H),
            _invert(squares),
            _invert(diagonal),
            self.steps,
        )
        return replace(self, right=found)

    def fit_core(self, more: int = 1) -> _Parts:
        """Lower the loss in S on its mask by ``more`` times the steps of conjugate gradients, on AᵀA S B H Bᵀ."""
        A, B, H = self.left, self.right, self.problem.hessian
        row = A.square().sum(1).reshape(-1, 1).clamp(min=torch.finfo(A.dtype).tiny)
        column = to_right(to_right(H, B.mT).mT.contiguous(), B.mT).diagonal()
        scale = (row * column.clamp(min=torch.finfo(A.dtype).tiny)).reciprocal() * self.mask

        def restrict(x: Tensor) -> Tensor:
            return to_right(to_left(A.mT, x @ H), B.mT) * self.mask

        found = _descend(
            self.core, restrict(self.problem.weight - self.dense), lambda d: restrict(replace(self, core=d).dense),
            scale, None, more * self.steps,
        )  # fmt: skip
        return replace(self, core=found)

    def renew(self, decide: Decide) -> _Parts | None:
        """Choose the mask anew, and fit the core on it; None where A or B can't be inverted."""
        A, B = (torch.linalg.inv_ex(part.double()) for part in (self.left, self.right))
        if A.info.any() or B.info.any():
            return None
        W = to_right(to_left(A.inverse.to(self.core), self.problem.weight), B.inverse.to(self.core))
        H = to_right(to_right(self.problem.hessian, self.right.mT).mT.contiguous(), self.right.mT)
        if not (W.isfinite().all() and H.isfinite().all()):
            return None
        mask = decide(Problem(W, (H + H.mT) / 2, damp=0.0))
        begun = replace(self, core=W * mask, mask=mask).fit_core(_MORE)
        return begun.fit_left().fit_right().fit_core(_MORE)


def _descend(
    x: Tensor, residual: Tensor, apply: Callable[[Tensor], Tensor], scale: Tensor, after: Tensor | None, steps: int
) -> Tensor:
    """Return x after steps of conjugate gradients, preconditioned by ``scale``, and from the right by ``after``."""

    def precondition(r: Tensor) -> Tensor:
        return r * scale if after is None else scale @ r @ after

    scaled = precondition(residual)
    direction, product = scaled, (residual * scaled).sum()
    for _ in range(steps):
        image = apply(direction)
        curvature = (direction * image).sum()
        if not (product > 0 and curvature > 0):
            break
        length = product / curvature
        x = x + length * direction
        residual = residual - length * image
        scaled = precondition(residual)
        product, before = (residual * scaled).sum(), product
        direction = scaled + product / before * direction
    return x


def _invert(blocks: Tensor) -> Tensor:
    """Return the inverses of positive semidefinite blocks (k, b, b), a millionth of their mean diagonal added."""
    mean = blocks.diagonal(dim1=1, dim2=2).mean(1).clamp(min=torch.finfo(blocks.dtype).tiny)
    eye = torch.eye(blocks.shape[1], dtype=torch.float64, device=blocks.device)
    return torch.linalg.inv(blocks.double() + 1e-6 * mean.double()[:, None, None] * eye).to(blocks)
