"""A pattern on the smallest weight that it fits, and what there is to say of it there."""

from __future__ import annotations

from math import log10
from typing import Any, Protocol

from s3lab.algebra import picture
from s3lab.algebra.count import COUNTED_SIDE
from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.partition import Partition
from s3lab.errors import ShapeError, SpecError
from s3lab.markup import caption


class Bindable(Protocol):
    """A pattern, as far as it is asked here."""

    @property
    def names(self) -> tuple[str, ...]: ...
    def bind(self, shape: Any) -> Any: ...


class Bound(Protocol):
    """A pattern on the shape of one weight, as far as it is asked here."""

    @property
    def text(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def first_part(self) -> Partition: ...
    @property
    def density(self) -> float: ...
    @property
    def storage_bits(self) -> float: ...
    @property
    def bitmask_bits(self) -> float: ...
    @property
    def mask_count(self) -> int: ...


SHAPES = ((8, 16), (8, 32), (16, 16), (16, 32), (32, 32), (64, 64), (128, 128), (256, 256))


def fit(pattern: Bindable) -> Any:
    """Return a pattern bound to the smallest of some shapes (M, K), for several weights (K, K) by name, that it fits.

    Raises SpecError where it fits none.

    >>> from s3lab import parse
    >>> fit(parse("8:16")).shape, fit(parse("block16")).shape
    ((8, 16), (16, 16))
    """
    reason = ""
    for M, K in SHAPES:
        try:
            return pattern.bind({name: (K, K) for name in pattern.names} if pattern.names else (M, K))
        except (SpecError, ShapeError) as error:
            reason = f"{error}"
    raise SpecError(f"{reason}\n    nor does a smaller shape fit")


def describe(bound: Bound | CoupledPartition) -> str:
    """Return a bound pattern's facts in a few lines.

    >>> from s3lab import parse
    >>> print(describe(parse("2:4").bind((8, 16))))
    2:4 on 8×16: 50% kept
    32 scopes of 4 blocks of 1 weight
    index 0.75 bits a weight, bitmask 1; about 10^24 masks
    """
    if isinstance(bound, CoupledPartition):
        place, part = ", ".join(f"{name} {M}×{K}" for name, (M, K) in bound.shapes.items()), bound
    else:
        place, part = "×".join(map(str, bound.shape)), bound.first_part
    first = "" if part is bound else f", of the first part {part.text}"
    scopes, size = (f"{n} {what}{'s' * (n > 1)}" for n, what in ((part.S, "scope"), (part.E, "weight")))
    return (
        f"{bound.text} on {place}: {100 * bound.density:.4g}% kept\n"
        + f"{scopes} of {part.B} blocks of {size}{first}\n"
        + f"index {bound.storage_bits:.4g} bits a weight, bitmask {bound.bitmask_bits:.4g}; "
        + _count(bound, part)
    )


def _count(bound: Bound | CoupledPartition, part: Partition | CoupledPartition) -> str:
    if isinstance(part, Partition) and part.lines is not None and part.B > COUNTED_SIDE**2:
        return "more masks than can be counted"
    return f"about 10^{int(log10(bound.mask_count))} masks"


def show(pattern: Bindable) -> str | None:
    """Return a pattern as HTML, drawn on a small weight with a random mask; None where it fits no small weight.

    Of a composed pattern the first part is drawn, whole, and of a coupled one the part in each weight.
    """
    try:
        bound = fit(pattern)
    except SpecError:
        return None
    if isinstance(bound, Partition):
        drawing = picture.draw_corner(bound, picture.sample_mask(bound).__getitem__)
    else:
        parts = bound.parts.values() if isinstance(bound, CoupledPartition) else [bound.first_part]
        drawing = " ".join(picture.draw_corner(part, lambda offset: True, columns=32) for part in parts)
    return caption(drawing, describe(bound))
