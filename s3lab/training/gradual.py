"""Gradual pruning: a budget that falls to that of the pattern, by nested masks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt

import torch
from torch import Tensor

from s3lab.algebra.compose import Bound, Nested, Salient
from s3lab.algebra.partition import Partition
from s3lab.errors import SolveError, SpecError
from s3lab.training.base import Method, SparseWeight, Tensors, Unit, cut_off


@dataclass(frozen=True)
class Gradual(Method):
    """Prune the smallest blocks little by little while the rest is trained; what is pruned stays so.

        s_t = s_f + (s_i − s_f)(1 − (t − start) / steps)³,    Ŵ = mask_t ⊙ W,    ∂L/∂W = mask_t ⊙ ∂L/∂Ŵ

    s_f is the sparsity of the pattern, s_i is ``initial``.  Every ``every`` steps, and at the end of ``steps``, each
    scope keeps the share 1 − s_t of its blocks, rounded to a count, the largest of those that it has; until then
    more is kept than the pattern asks for, by the same blocks and scopes.  ``first then second`` prunes first by the
    first part alone, and then by the second on what it left; ``each way`` lowers the count of all lines at once.

    Raises SolveError for a schedule that is none, SpecError from `sparse` where ``initial`` is above the sparsity of
    the pattern.  Source: Zhu and Gupta, 2017, equation 1.

    >>> import s3lab as s3
    >>> layer = torch.nn.Linear(16, 4)
    >>> sparsity = s3.sparse(layer, "2:16", Gradual(steps=4, every=1))
    >>> kept = [sparsity.masks[""][0].sum().item()]
    >>> for _ in range(5):
    ...     sparsity.step()
    ...     kept.append(sparsity.masks[""][0].sum().item())
    >>> kept
    [16, 8, 4, 2, 2, 2]
    """

    steps: int = 1000
    every: int = 100
    start: int = 0
    initial: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.every < 1 or self.start < 0 or not 0 <= self.initial < 1:
            raise SolveError(f"{self}: steps and every are at least 1, start at least 0, initial from 0 to below 1")

    def begin(self, unit: Unit, generator: torch.Generator) -> Tensors:
        if self.initial > 1 - unit.grid.density:
            raise SpecError(
                f"{', '.join(unit.layers)}: a sparsity of {self.initial:g} at first is above that of {unit.spec}, "
                f"{1 - unit.grid.density:g}: lower initial"
            )
        return unit.project(unit.squares(), lower(unit.grid, 1 - self.initial))

    def weigh(self, W: Tensor, own: SparseWeight) -> Tensor:
        return cut_off(W, own.mask)

    def density(self, last: float, steps: int) -> float:
        """Return the share of the weights that is kept after a number of steps, ``last`` at the end.

        >>> [round(Gradual(steps=4).density(0.5, t), 3) for t in range(6)]
        [1.0, 0.711, 0.562, 0.508, 0.5, 0.5]
        """
        share = min(max((steps - self.start) / self.steps, 0.0), 1.0)
        return last + (1 - self.initial - last) * (1 - share) ** 3

    def step(self, unit: Unit, optimizer: torch.optim.Optimizer | None) -> None:
        done = unit.steps - self.start
        if 0 < done <= self.steps and (done % self.every == 0 or done == self.steps):
            squares, masks = unit.squares(), unit.masks
            gone = -1 - float(sum(square.sum() for square in squares.values()))  # no sum of others makes up for it
            worth = {name: square.masked_fill(~masks[name], gone) for name, square in squares.items()}
            unit.put(unit.project(worth, self.bound(unit)))

    def bound(self, unit: Unit) -> Bound:
        done = min(max(unit.steps - self.start, 0), self.steps)
        last = done if done == self.steps else done - done % self.every  # when the masks were last made
        return lower(unit.grid, self.density(unit.grid.density, self.start + last))


def lower(bound: Bound, density: float) -> Bound:
    """Return a bound pattern with a budget that keeps about this share of the weights, and no less than its own.

    >>> from s3lab import parse
    >>> lower(parse("2:8").bind((1, 16)), 0.5).keep, lower(parse("2:4 each way").bind((4, 4)), 0.75).keep
    (4, 12)
    >>> lower(parse("2:4@4x1 then 2:4").bind((4, 8)), 0.4).density
    0.375
    """
    if isinstance(bound, Nested):
        if density > bound.first.density:
            return lower(bound.first, density)
        return replace(bound, second=lower(bound.second, density / bound.first.density))
    if isinstance(bound, Salient):
        return replace(bound, main=lower(bound.main, density - (bound.density - bound.main.density)))
    return _lower_part(bound, density)


def _lower_part(part: Partition, density: float) -> Partition:
    if part.lines is None:
        return replace(part, keep=max(part.keep, round(density * part.B)))
    side = isqrt(part.B)
    lines = max(part.lines, round(density * side))
    return replace(part, keep=lines * side, lines=lines)
