"""Specs made of specs: `Then` decides among what another kept, `Plus` adds salient blocks that are kept in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from s3lab.algebra.partition import Partition
from s3lab.algebra.spec import Pattern, Spec, View
from s3lab.algebra.stage import Decide, Stage
from s3lab.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, repr=False)
class Then(Pattern):
    """``first then second``: ``second`` decides among the weights that ``first`` kept.

    The blocks that a scope of ``first`` keeps are put side by side, in order, along the rows if its scopes are
    columns of blocks and along the columns otherwise; ``second`` is bound to the weight that this makes.  With scopes
    of 1×M blocks of V×1 that keep 4 and ``2:4`` this is V:N:M.  ``first`` must look at the matrix as it is.

    Raises SpecError where ``first`` has a view of its own.  Source: V:N:M, Castro et al., *VENOM*, 2023.

    >>> from s3lab import parse
    >>> vnm = parse("4:8@64x1 then 2:4")
    >>> vnm.bind((64, 16)).density, vnm.bind((64, 16)).storage_bits
    (0.25, 0.388671875)
    """

    first: Spec
    second: Spec | Then

    def __post_init__(self) -> None:
        if self.first.view != View():
            raise SpecError(
                f"{self.first} then …: the kept blocks of a view of its own cannot be laid side by side; give a first "
                "part on the matrix as it is, such as '4:8@64x1'"
            )

    def bind(self, shape: Sequence[int]) -> Nested:
        """Return the pattern on a weight (M, K); SpecError where ``second`` does not fit what ``first`` leaves."""
        first = self.first.bind(shape)
        rows, columns = (mode.size for mode in first.layout[1])
        M, K = shape[0] // rows, shape[1] // columns
        left = (M * first.keep, K) if columns == 1 else (M, K * first.keep)
        return Nested(str(self), first, self.second.bind(left))

    def __str__(self) -> str:
        return f"{self.first} then {self.second}"


@dataclass(frozen=True, repr=False)
class Plus(Pattern):
    """``main plus salient``: the blocks that ``salient`` keeps stay in full, ``main`` is applied to the rest.

    A scope of ``main`` keeps as many blocks as ever among those that are not salient, and all of them where fewer are
    left.  Salient blocks are those that hold the most of what ``main`` alone would let go: by the score of a solver
    that scores, and otherwise by what the removal of a weight alone would cost.  A block that ``main`` keeps anyway
    needs no place among them; so of single weights, where each scope of ``main`` lies within one of ``salient``, no
    mask keeps a higher sum of scores.  ``salient=`` of `prune` has the blocks of the highest score picked, as the paper
    does.  ``bind`` raises SpecError where a part does not fit a weight (M, K).

    Source: structured salient weights, arXiv 2507.03052; tiles dense or 2:4 (PATCH) are ``2:4 plus 50%@128x128``.

    >>> from s3lab import parse
    >>> both = parse("8:16 plus 16:256").bind((4, 512))
    >>> both.density, both.storage_bits
    (0.5625, 1.203125)

    The salient one of these is the last, as ``1:2`` keeps 7 and 5 in any case:

    >>> import torch
    >>> parse("1:2 plus 1:4").bind((1, 4)).project(torch.tensor([[7.0, 1.0, 5.0, 4.0]])).tolist()
    [[True, False, True, True]]
    """

    main: Spec | Then | Plus
    salient: Spec

    def bind(self, shape: Sequence[int]) -> Salient:
        """Return the pattern on a weight (M, K); SpecError where a part does not fit."""
        return Salient(str(self), self.main.bind(shape), self.salient.bind(shape))

    def __str__(self) -> str:
        return f"{self.main} plus {self.salient}"


class Composed:
    """What the bound forms of `Then` and `Plus` share: all of it said through `resolve`."""

    text: str
    shape: tuple[int, int]
    first_part: Partition
    storage_rounds: tuple[tuple[str, float], ...]
    resolve: Callable[[Decide, Tensor], Tensor]

    @property
    def width(self) -> int:
        """Number of columns that a block of the first part reaches over."""
        return self.first_part.width

    @property
    def storage_bits(self) -> float:
        """Bits per weight of the index, of all its rounds."""
        return sum(bits for _, bits in self.storage_rounds)

    def project(self, scores: Tensor) -> Tensor:
        """Return the mask (M, K), True = kept, that keeps the blocks of the highest sums of scores, round by round."""
        return self.resolve(lambda stage: stage.choose(stage.blocks(scores).sum(-1)), scores)


@dataclass(frozen=True)
class Nested(Composed):
    """`Then` on a weight: ``first`` on the weight, ``second`` on what it leaves."""

    text: str
    first: Partition
    second: Partition | Nested

    @property
    def first_part(self) -> Partition:
        """The part that decides first."""
        return self.first

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return self.first.shape

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.first.density * self.second.density

    @property
    def storage_rounds(self) -> tuple[tuple[str, float], ...]:
        """Bits per weight of the index by round: of the first part, and of the second on what the first kept."""
        inside = ((text, self.first.density * bits) for text, bits in self.second.storage_rounds)
        return (*self.first.storage_rounds, *inside)

    @property
    def bitmask_bits(self) -> float:
        """Bits per weight with a bit for each block of the first part and each of the second on what is left."""
        return self.first.bitmask_bits + self.first.density * self.second.bitmask_bits

    @property
    def mask_count(self) -> int:
        """Number of ways to choose, exactly: of masks as well, but for those that several ways give."""
        return self.first.mask_count * self.second.mask_count

    def resolve(self, decide: Decide, worth: Tensor) -> Tensor:
        """Return the mask (M, K) of the blocks that ``decide`` keeps, of the first part and then of the second."""
        survivors = self._survivors(decide(self.first.stage(worth)))

        def decide_inside(stage: Stage) -> Tensor:
            return decide(stage.within(survivors, self.shape, f"{self.text} on {self.shape}"))

        inside = self.second.resolve(decide_inside, worth.reshape(-1)[survivors])
        mask = inside.new_zeros(prod(self.shape))
        mask[survivors.reshape(-1)] = inside.reshape(-1)
        return mask.view(self.shape)

    def check(self, mask: Tensor) -> None:
        """Raise SpecError unless the bool mask (M, K) is one of the first part and then of the second.

        Where a kept block keeps nothing of its own, which block it was cannot be told from the mask: then only the
        number of weights is checked beside the number of blocks.
        """
        full = self.first.blocks(mask != 0).any(-1)
        count = full.sum(1)
        if bool((count > self.first.keep).any()):
            scope = int((count > self.first.keep).long().argmax())
            raise SpecError(
                f"the mask breaks {self.text} on {self.shape} at scope {scope} of {self.first.text}: weights are kept "
                f"in {int(count[scope])} of its blocks, not in {self.first.keep}"
            )
        if bool((count == self.first.keep).all()):
            self.second.check(mask.reshape(-1)[self._survivors(full)])
        elif (kept := int((mask != 0).sum())) != round(self.density * prod(self.shape)):
            raise SpecError(
                f"the mask keeps {kept} weights where {self.text} on {self.shape} keeps "
                f"{round(self.density * prod(self.shape))}"
            )

    def _survivors(self, kept: Tensor) -> Tensor:
        """The offsets (M', K') of the weights in the blocks kept, (S, B), laid side by side."""
        part = self.first
        blocks = part.choose(kept.float()).float().sort(dim=1, descending=True).indices[:, : part.keep]
        blocks = blocks.sort(dim=1).values
        offsets = part.stage(kept).offsets
        chosen = offsets.gather(1, blocks.unsqueeze(-1).expand(*blocks.shape, part.E))
        (scope_rows, scope_columns), (_, columns), (rows, width) = (
            tuple(mode.size for mode in mode) for mode in part.layout
        )
        grid = chosen.view(scope_rows, scope_columns, part.keep, rows, width)
        if columns == 1:
            return grid.permute(0, 2, 3, 1, 4).reshape(scope_rows * part.keep * rows, scope_columns * width)
        return grid.permute(0, 3, 1, 2, 4).reshape(scope_rows * rows, scope_columns * part.keep * width)


@dataclass(frozen=True)
class Salient(Composed):
    """`Plus` on a weight: ``salient`` says what is kept in full, ``main`` what of the rest.

    ``chosen``, bool (M, K), are the salient weights where they are decided already.
    """

    text: str
    main: Partition | Nested | Salient
    salient: Partition
    chosen: Tensor | None = field(default=None, compare=False)

    @property
    def first_part(self) -> Partition:
        """The part that decides first, beside the salient ones."""
        return self.main.first_part

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return self.salient.shape

    @property
    def density(self) -> float:
        """Share of the weights that is kept; a little less where a scope of the main part has too few weights left."""
        return min(1.0, self.salient.density + self._rest * self.main.density)

    @property
    def storage_rounds(self) -> tuple[tuple[str, float], ...]:
        """Bits per weight of the index by round: of the salient part, and of the main part where it decides."""
        return (*self.salient.storage_rounds, *((text, self._rest * bits) for text, bits in self.main.storage_rounds))

    @cached_property
    def _rest(self) -> float:
        """The share of the main part's scopes that has something to decide: less than all where salient blocks are
        as large as scopes, and hide them."""
        part = self.first_part
        if part.B * part.E > self.salient.E:
            return 1.0
        number = self.salient.layout.right_inverse()
        homes = {number(part.layout(0, b, e)) // self.salient.E for b in range(part.B) for e in range(part.E)}
        return 1.0 - self.salient.density if len(homes) == 1 else 1.0

    @property
    def bitmask_bits(self) -> float:
        """Bits per weight with a bit for each block of both."""
        return self.salient.bitmask_bits + self._rest * self.main.bitmask_bits

    @property
    def mask_count(self) -> int:
        """Number of ways to choose, exactly, that of the rest as if nothing were salient: no fewer than masks."""
        return self.main.mask_count * self.salient.mask_count

    def resolve(self, decide: Decide, worth: Tensor) -> Tensor:
        """Return the mask (M, K): salient blocks by ``worth`` (M, K), of the rest what ``decide`` keeps."""
        salient = self.chosen
        if salient is None:
            salient = self.salient.project(worth * ~self.main.project(worth))
        text = f"{self.text} on {self.shape}"
        return salient | self.main.resolve(lambda stage: decide(stage.without(salient, text)), worth)

    def fix(self, worth: Tensor) -> Salient:
        """Return this pattern with those blocks salient that have the highest ``worth`` (M, K), for whatever solver."""
        main = self.main.fix(worth) if isinstance(self.main, Salient) else self.main
        return replace(self, main=main, chosen=self.salient.project(worth))

    def check(self, mask: Tensor) -> None:
        """Raise SpecError unless the bool mask (M, K) keeps enough whole blocks of both parts, and no more in all.

        Which weights are the salient ones cannot be told from the mask; a mask of this pattern never fails.
        """
        self._check_whole(self.salient, mask)
        if isinstance(self.main, Partition):
            self._check_whole(self.main, mask)
        kept, most = int((mask != 0).sum()), round(self.density * prod(self.shape))
        if kept > most:
            raise SpecError(f"the mask keeps {kept} weights where {self.text} on {self.shape} keeps at most {most}")

    def _check_whole(self, part: Partition, mask: Tensor) -> None:
        whole = (part.blocks(mask != 0).long().sum(-1) == part.E).sum(1)
        if bool((whole < part.keep).any()):
            scope = int((whole < part.keep).long().argmax())
            raise SpecError(
                f"the mask breaks {self.text} on {self.shape} at scope {scope} of {part.text}: it keeps "
                f"{int(whole[scope])} whole blocks of {part.B}, fewer than {part.keep}"
            )


Bound = Partition | Nested | Salient
