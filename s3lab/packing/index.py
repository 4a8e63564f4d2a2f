"""The index of one round of decisions: which blocks each scope keeps, as bytes."""

from __future__ import annotations

from math import comb, isqrt

import torch
from torch import Tensor

from s3lab.algebra.count import INDEXED_SIDE, index_bits
from s3lab.errors import DataError
from s3lab.packing.bits import LIMB, Reader, byte_count, pack_words, unpack_words
from s3lab.packing.entropy import decode_bits, encode_bits
from s3lab.packing.rank import rank_subsets, unrank_subsets
from s3lab.packing.squares import rank_squares, unrank_squares

RANKED = 256  # blocks of a scope that has a rank of its own; wider ones are bits side by side, by their entropy


def write_choice(kept: Tensor, keep: Tensor, present: Tensor | None = None, lines: int | None = None) -> Tensor:
    """Return which blocks scopes keep, bool (S, B), ``keep`` (S,) of those ``present`` (S, B), as bytes.

    Of a scope of up to `RANKED` blocks that is its rank, in ⌈log2 C(B, keep)⌉ bits, as many for each: never more than
    a bit for each block.  Wider scopes stand side by side as `encode_bits` has them.  With ``lines`` a scope is a
    square that keeps that many in each row and column, one number up to a side of 10 and above one for each row.
    Scopes with nothing to decide, none or all to keep, take no bits.

    >>> kept = torch.tensor([[True, True, False, False], [False, False, True, True]])
    >>> write_choice(kept, torch.tensor([2, 2])).tolist()
    [40]
    """
    if lines is not None:
        squares = kept.view(len(kept), isqrt(kept.shape[1]), -1)
        if squares.shape[1] > INDEXED_SIDE:
            rows = squares.flatten(0, 1)
            return write_choice(rows, torch.full((len(rows),), lines))
        return pack_words(_split(rank_squares(squares, lines)), int(index_bits(kept.shape[1], 0, lines)))
    number = _count(present, kept.shape)
    open_ = (keep > 0) & (keep < number)
    kept, keep, number, present = _take(open_, kept, keep, number, present)
    if not len(kept):
        return torch.empty(0, dtype=torch.uint8)
    if kept.shape[1] > RANKED:
        return encode_bits(kept.flatten() if present is None else kept[present])
    width = _width(number, keep)
    return pack_words(rank_subsets(kept, present, width), width)


def read_choice(
    reader: Reader,
    shape: tuple[int, int],
    keep: Tensor,
    present: Tensor | None = None,
    lines: int | None = None,
) -> Tensor:
    """Take what `write_choice` wrote of ``shape`` (S, B) from a reader; DataError where that is no choice of blocks."""
    scopes, blocks = shape
    if lines is not None:
        side = isqrt(blocks)
        if side > INDEXED_SIDE:
            keep = torch.full((scopes * side,), lines)
            return read_choice(reader, (scopes * side, side), keep).view(scopes, blocks)
        width = int(index_bits(blocks, 0, lines))
        words = unpack_words(reader.take(byte_count(scopes * width)), scopes, width)
        return unrank_squares(_join(words), side, lines).view(scopes, blocks)
    number = _count(present, shape)
    open_ = (keep > 0) & (keep < number)
    kept = (keep > 0).unsqueeze(1).expand(shape) if present is None else present & (keep > 0).unsqueeze(1)
    if not open_.any():
        return kept.clone()
    _, keep, number, present = _take(open_, kept, keep, number, present)
    if blocks > RANKED:
        found = _read_wide(reader, (len(keep), blocks), keep, number, present)
    else:
        width = _width(number, keep)
        words = unpack_words(reader.take(byte_count(len(keep) * width)), len(keep), width)
        found = unrank_subsets(words, blocks, keep, present, width)
    if bool(open_.all()):
        return found
    kept = kept.clone()
    kept[open_] = found
    return kept


def _read_wide(reader: Reader, shape: tuple[int, int], keep: Tensor, number: Tensor, present: Tensor | None) -> Tensor:
    bits = decode_bits(reader, int(number.sum()), int(keep.sum()))
    found = bits.view(shape) if present is None else torch.zeros(shape, dtype=torch.bool).masked_scatter_(present, bits)
    if (wrong := found.sum(1) != keep).any():
        scope = int(wrong.long().argmax())
        raise DataError(
            f"the index keeps {int(found[scope].sum())} blocks of scope {scope} and not {int(keep[scope])}: the file "
            "is damaged, pack the model again"
        )
    return found


def _count(present: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """How many blocks each scope has, long (S,)."""
    return torch.full((shape[0],), shape[1]) if present is None else present.sum(1)


def _take(
    chosen: Tensor, kept: Tensor, keep: Tensor, number: Tensor, present: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if bool(chosen.all()):
        return kept, keep, number, present
    return kept[chosen], keep[chosen], number[chosen], None if present is None else present[chosen]


def _width(number: Tensor, keep: Tensor) -> int:
    """The bits of the largest rank of scopes of so many blocks."""
    pairs = torch.bincount(number * (RANKED + 1) + keep).nonzero().flatten().tolist()
    return max((comb(*divmod(pair, RANKED + 1)) - 1).bit_length() for pair in pairs)


def _split(words: Tensor) -> Tensor:
    """Numbers below 2^63 in the two limbs that pack_words takes."""
    return torch.stack([words & ((1 << LIMB) - 1), words >> LIMB], 1)


def _join(words: Tensor) -> Tensor:
    return words[:, 0] + (words[:, 1] << LIMB if words.shape[1] > 1 else 0)
