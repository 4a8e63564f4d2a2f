"""The canonical form: a spec on a shape, as one layout of three modes, and what it does to tensors.

Everything here is said in the methods of the tensors that come in, so that the algebra needs no tensor library.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import comb, isqrt, prod
from typing import TYPE_CHECKING

from s3lab.algebra.choose import keep_highest
from s3lab.algebra.count import count_squares, index_bits
from s3lab.algebra.layout import Layout
from s3lab.algebra.lines import choose_lines
from s3lab.algebra.stage import Decide, Stage
from s3lab.errors import ShapeError, SpecError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """A spec on a weight (M, K): ``layout`` maps (scope, block, element) to the offset in the row-major weight.

    S scopes of B blocks of E elements, S·B·E = M·K; each scope keeps ``keep`` of its B blocks, and with ``lines``
    that many of each row and of each column of the square that they are.  Made by `Spec.bind`, which checks that the
    layout is a bijection.  Its methods raise ShapeError for tensors of another shape than (M, K), or (S, B, E).

    >>> import torch
    >>> from s3lab import parse
    >>> part = parse("2:4").bind((2, 8))
    >>> part.S, part.B, part.E, part.density, part.storage_bits
    (4, 4, 1, 0.5, 0.75)
    >>> part.project(torch.tensor([[4.0, 3, 2, 1, 1, 2, 3, 4]] * 2))[0].tolist()
    [True, True, False, False, False, False, True, True]
    """

    text: str
    shape: tuple[int, int]
    layout: Layout
    keep: int
    lines: int | None = None

    @property
    def first_part(self) -> Partition:
        """The part that decides first: this, which is all there is."""
        return self

    @cached_property
    def S(self) -> int:
        """Number of scopes."""
        return self.layout[0].size

    @cached_property
    def B(self) -> int:
        """Number of blocks in a scope."""
        return self.layout[1].size

    @cached_property
    def E(self) -> int:
        """Number of elements in a block."""
        return self.layout[2].size

    @cached_property
    def width(self) -> int:
        """Number of columns that a block reaches over."""
        return len({offset % self.shape[1] for offset in self.layout[2].offsets()})

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.keep / self.B

    @property
    def storage_bits(self) -> float:
        """Bits per weight that an index of the mask takes: ⌈log2 C(B, keep)⌉ a scope (arXiv 2507.03052).

        Each way, a scope has one index up to a side of 10; above, its rows have one each.
        """
        return index_bits(self.B, self.keep, self.lines) / (self.B * self.E)

    @property
    def storage_rounds(self) -> tuple[tuple[str, float], ...]:
        """The text of each round of the pattern, here one, and the bits per weight of its index."""
        return ((self.text, self.storage_bits),)

    @property
    def bitmask_bits(self) -> float:
        """Bits per weight of a mask with a bit for each block."""
        return 1 / self.E

    @property
    def mask_count(self) -> int:
        """Number of masks that satisfy the spec, exactly: C(B, keep)^S where nothing is said of lines."""
        count = comb(self.B, self.keep) if self.lines is None else count_squares(isqrt(self.B), self.lines)
        return count**self.S

    def blocks(self, W: Tensor) -> Tensor:
        """Return W (M, K) as (S, B, E): a view of its storage where the strides allow, else a copy.

        Raises ShapeError if W has another shape than the partition.
        """
        self._expect(W)
        pairs = self.layout.flat
        strided = W.contiguous().as_strided([n for n, _ in pairs], [d for _, d in pairs])
        return strided.reshape(self.S, self.B, self.E)

    def scatter(self, values: Tensor) -> Tensor:
        """Return the weight-shaped (M, K) tensor whose blocks are ``values``: (S, B, E), or (S, B) for whole blocks.

        The inverse of `blocks`.  Raises ShapeError on any other shape.
        """
        if values.shape == (self.S, self.B):
            values = values.unsqueeze(-1).expand(self.S, self.B, self.E)
        if values.shape != (self.S, self.B, self.E):
            raise ShapeError(
                f"values of shape {tuple(values.shape)} are no blocks of {self.text} on {self.shape}: expected "
                f"({self.S}, {self.B}) or ({self.S}, {self.B}, {self.E})"
            )
        pairs = self.layout.flat
        extents = [n for n, _ in pairs]
        out = values.new_empty(prod(self.shape))
        out.as_strided(extents, [d for _, d in pairs]).copy_(values.reshape(extents))
        return out.view(self.shape)

    def choose(self, scores: Tensor) -> Tensor:
        """Return which blocks are kept, bool (S, B): the ``keep`` highest of each scope, of equals the first ones.

        Raises ShapeError unless the scores are (S, B) and free of NaN.
        """
        if scores.shape != (self.S, self.B):
            raise ShapeError(f"scores of shape {tuple(scores.shape)} for {self.S} scopes of {self.B} blocks")
        if scores.sum().isnan() and scores.isnan().any():  # the sum alone is quicker, and nearly always enough
            raise ShapeError(f"the scores of {self.text} on {self.shape} hold NaN: clean the weight or the Hessian")
        return keep_highest(scores, self.keep) if self.lines is None else choose_lines(scores, self.lines)

    def resolve(self, decide: Decide, worth: Tensor) -> Tensor:
        """Return the mask (M, K) of the blocks that ``decide`` keeps in the one round that there is.

        ``worth`` (M, K) is what a pattern with salient blocks picks them by; here it only tells the device.
        """
        return self.stage(worth).resolve(decide, worth)

    def stage(self, like: Tensor) -> Stage:
        """Return the one round that decides all of it, on the device of a tensor."""
        M, K = self.shape
        numbers = like.new_ones(M * K).long().cumsum(0).sub_(1).view(M, K)
        goes = numbers.new_full((self.S,), self.B - self.keep)
        return Stage(self.text, self.shape, self.blocks(numbers).contiguous(), goes, self.lines)

    def project(self, scores: Tensor) -> Tensor:
        """Return the mask (M, K), True = kept, of the blocks with the highest sums of element scores (M, K)."""
        return self.scatter(self.choose(self.blocks(scores).sum(-1)))

    def check(self, mask: Tensor) -> None:
        """Raise SpecError, naming the first scope at fault, unless the bool mask (M, K) satisfies the spec."""
        kept = self.blocks(mask != 0).long().sum(-1)
        partial = ((kept > 0) & (kept < self.E)).any(1)
        count = (kept == self.E).sum(1)
        wrong = partial | (count != self.keep)
        if self.lines is not None:
            square = (kept == self.E).view(self.S, isqrt(self.B), -1)
            wrong |= ((square.sum(1) != self.lines) | (square.sum(2) != self.lines)).any(1)
        if wrong.any():
            scope = int(wrong.long().argmax())
            row, column = divmod(self.layout(scope, 0, 0), self.shape[1])
            fault = (
                "cuts a block in two"
                if partial[scope]
                else f"keeps {int(count[scope])} of {self.B} blocks, not {self.keep}"
                + ("" if self.lines is None else f", {self.lines} in each row and column")
            )
            raise SpecError(
                f"the mask breaks {self.text} on {self.shape} at scope {scope} (from row {row}, column {column}): "
                f"it {fault}"
            )

    def _expect(self, W: Tensor) -> None:
        if tuple(W.shape) != self.shape:
            raise ShapeError(f"a tensor of shape {tuple(W.shape)} where {self.text} is bound to {self.shape}")
