"""One round of decisions: blocks of weights that compete in scopes, by their offsets, whatever they are part of.

Everything is said in the methods of the tensors that come in, so that the algebra needs no tensor library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from s3lab.algebra.choose import keep_highest
from s3lab.algebra.lines import choose_lines

if TYPE_CHECKING:
    from torch import Tensor

Decide = Callable[["Stage"], "Tensor"]


@dataclass(frozen=True, eq=False)
class Stage:
    """Blocks of a weight (M, K) that compete: ``goes[s]`` of those of scope s must go.

    ``offsets`` (S, B, E) long points into the row-major weight; -1 stands for an element, or a block, that is not
    there.  Weights that earlier rounds took are True in ``pruned`` (M, K) and are in no block; others in no block
    stay.  With ``lines`` a scope is a square of blocks, row-major, of which every row and every column keeps that
    many.  A pattern is a program of such rounds: it hands each to a solver, which answers with the blocks to keep.
    """

    text: str
    shape: tuple[int, int]
    offsets: Tensor
    goes: Tensor
    lines: int | None = None
    pruned: Tensor | None = None

    @property
    def S(self) -> int:
        """Number of scopes."""
        return self.offsets.shape[0]

    @property
    def B(self) -> int:
        """Number of blocks in the largest scope."""
        return self.offsets.shape[1]

    @property
    def E(self) -> int:
        """Number of elements in the largest block."""
        return self.offsets.shape[2]

    @property
    def present(self) -> Tensor:
        """Which blocks there are, bool (S, B)."""
        return (self.offsets >= 0).any(-1)

    @property
    def width(self) -> int:
        """Number of columns that the first block reaches over."""
        first = self.offsets[0, 0]
        return len((first[first >= 0] % self.shape[1]).unique())

    def blocks(self, W: Tensor) -> Tensor:
        """Return the weights (M, K) of each block, (S, B, E), zero where there are none."""
        return W.reshape(-1)[self.offsets.clamp(min=0)] * (self.offsets >= 0)

    def choose(self, cost: Tensor, scopes: Tensor | None = None) -> Tensor:
        """Return which blocks stay, bool (n, B), by what the removal of each costs, (n, B), of equals the first ones.

        ``scopes`` (n,) says which scopes the rows are, if not all.
        """
        present, goes = self.present, self.goes
        if scopes is not None:
            present, goes = present[scopes], goes[scopes]
        if self.lines is not None:
            return choose_lines(cost.masked_fill(~present, 0), self.lines) & present
        return keep_highest(cost.masked_fill(~present, -float("inf")), present.sum(1) - goes) & present

    def scatter(self, kept: Tensor) -> Tensor:
        """Return the mask (M, K) of the blocks that stay (S, B), with all weights in no block that are still there."""
        whole = kept.new_ones(self.shape).bool() if self.pruned is None else ~self.pruned
        mask, there = whole.reshape(-1).clone(), self.offsets >= 0
        mask[self.offsets[there]] = kept.unsqueeze(-1).expand(self.offsets.shape)[there]
        return mask.view(self.shape)

    def gather(self, mask: Tensor) -> Tensor:
        """Return which blocks a mask (M, K) keeps, bool (S, B): the inverse of `scatter`."""
        return (self.blocks(mask) > 0).any(-1)

    def resolve(self, decide: Decide, worth: Tensor) -> Tensor:
        """Return the mask (M, K) of the blocks that ``decide`` keeps: a round is the shortest of programs."""
        return self.scatter(decide(self))

    def project(self, scores: Tensor) -> Tensor:
        """Return the mask (M, K) that keeps the blocks of the highest sums of element scores (M, K)."""
        return self.scatter(self.choose(self.blocks(scores).sum(-1)))

    def within(self, survivors: Tensor, shape: tuple[int, int], text: str) -> Stage:
        """Return this round moved into a weight where ``survivors`` (M, K) are its offsets, and the rest is gone."""
        pruned = survivors.new_ones(shape).bool()
        pruned.view(-1)[survivors.reshape(-1)] = False
        if self.pruned is not None:
            pruned.view(-1)[survivors[self.pruned]] = True
        offsets = survivors.reshape(-1)[self.offsets.clamp(min=0)].masked_fill(self.offsets < 0, -1)
        return replace(self, text=text, shape=shape, offsets=offsets, pruned=pruned)

    def without(self, reserved: Tensor, text: str) -> Stage:
        """Return this round on the weights not ``reserved``, bool (M, K); its scopes keep as many blocks of those."""
        taken = reserved.reshape(-1)[self.offsets.clamp(min=0)]
        rest = replace(self, text=text, offsets=self.offsets.masked_fill(taken, -1))
        lost = self.present.sum(1) - rest.present.sum(1)
        pruned = None if self.pruned is None else self.pruned & ~reserved
        return replace(rest, goes=(self.goes - lost).clamp(min=0), pruned=pruned)
