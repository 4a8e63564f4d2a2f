"""Layouts that hardware and torch prescribe: 2:4 with indices of 2 bits, and blocks as torch's BSR."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from s3lab.algebra.layout import Layout
from s3lab.algebra.partition import Partition
from s3lab.errors import SpecError
from s3lab.packing.codec import ALONE, Packed, bind

_HALF = torch.float16, torch.bfloat16


def to_semi_structured(packed: Packed) -> tuple[Tensor, Tensor]:
    """Return a weight (M, K) at 2:4 as torch's semi-structured tensors hold it.

    That is the values (M, K/2), and the indices (M, K/16) int16.  A kept weight's place in its four takes 2 bits, the
    first one low, four fours a word: one bit a weight.  Words stand in the order that CUTLASS reads them in,
    `order_words`.  On a CUDA device, ``SparseSemiStructuredTensorCUTLASS(shape, values, indices, None, None, None)``
    multiplies by them; cuSPARSELt keeps its order to itself, and takes ``unpack()`` through
    ``torch.sparse.to_sparse_semi_structured``.

    Raises SpecError for another pattern, another dtype than float16 and bfloat16, and an M or K that is no multiple of
    32 or 64.

    >>> from s3lab.packing.codec import pack
    >>> values, indices = to_semi_structured(pack(torch.tensor([[1.0, 0, 2, 0] * 16] * 32).bfloat16(), "2:4"))
    >>> values.shape, indices.shape, hex(indices[0, 0])
    (torch.Size([32, 32]), torch.Size([32, 4]), '-0x7778')
    """
    part = _bound(packed)
    (M, K), dtype = part.shape, packed.values[ALONE].dtype
    if (part.B, part.E, part.keep) != (4, 1, 2) or part.layout.coalesce() != Layout(M * K, 1):
        raise SpecError(f"{part.text} is not 2:4 along the inputs: hardware has an index for no other pattern")
    if dtype not in _HALF or M % 32 or K % 64:
        raise SpecError(
            f"2:4 of a {dtype} weight ({M}, {K}) has no layout for hardware: give float16 or bfloat16, M a multiple of "
            "32 and K one of 64"
        )
    places = packed.masks()[ALONE].view(-1, 4).nonzero()[:, 1].view(M, K // 16, 8)
    words = (places << torch.arange(0, 16, 2)).sum(2).to(torch.int16)
    ordered = torch.empty(M * K // 16, dtype=torch.int16)
    ordered[torch.tensor(list(order_words(M, K // 16).offsets()))] = words.flatten()
    return packed.values[ALONE].decode().view(M, K // 2), ordered.view(M, K // 16)


def order_words(rows: int, columns: int) -> Layout:
    """Return where CUTLASS has the word of 16 bits at a row and column, as a layout ((rows), (columns)).

    Of each 32 rows, 8 apart stand side by side, two by two with the word in the next column; columns are two by two.

    >>> order_words(32, 4)
    Layout('((1,2,2,8),(2,2)):((64,4,1,8),(64,2))')
    """
    return Layout(((rows // 32, 2, 2, 8), (columns // 2, 2)), ((64, 4, 1, 8), (2 * rows, 2)))


def find_tile(part: Partition) -> tuple[int, int] | None:
    """Return rows and columns of the blocks, if each is a tile of the matrix on a grid of such tiles, else None.

    >>> from s3lab import parse
    >>> find_tile(parse("50%@4x8").bind((16, 32))), find_tile(parse("coupled-2:4").bind((16, 32)))
    ((4, 8), None)
    """
    K, block = part.shape[1], sorted(part.layout[2].offsets())
    columns = sum(offset < K for offset in block)
    rows = len(block) // columns
    if block != [row * K + column for row in range(rows) for column in range(columns)]:
        return None
    steps = [step for extent, step in Layout.of(part.layout[0], part.layout[1]).flat if extent > 1]
    aligned = all(step % columns == 0 if step < K else step % (rows * K) == 0 for step in steps)
    return (rows, columns) if aligned else None


def to_bsr(packed: Packed) -> Tensor:
    """Return a weight whose blocks are tiles as a torch tensor of layout ``torch.sparse_bsr``, its kept blocks stored.

    Raises SpecError where blocks are no tiles of the matrix.

    >>> from s3lab.packing.codec import pack
    >>> to_bsr(pack(torch.tensor([[1.0, 2, 0, 0], [0, 0, 3, 4]]), "1:2@1x2")).values().tolist()
    [[[1.0, 2.0]], [[3.0, 4.0]]]
    """
    part = _bound(packed)
    (M, K), tile = part.shape, find_tile(part)
    if tile is None:
        raise SpecError(f"the blocks of {part.text} are no tiles of a weight ({M}, {K}): BSR holds tiles only")
    rows, columns = tile
    grid = packed.masks()[ALONE][::rows, ::columns]
    tiles = packed.unpack_one(ALONE).view(M // rows, rows, K // columns, columns).transpose(1, 2)
    ends = torch.nn.functional.pad(grid.sum(1).cumsum(0), (1, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that BSR is in beta is told on the page of packing
        return torch.sparse_bsr_tensor(ends, grid.nonzero()[:, 1], tiles[grid], (M, K))


def _bound(packed: Packed) -> Partition:
    part = None if packed.pattern.names else bind(packed.pattern, packed.shapes)
    if not isinstance(part, Partition):
        raise SpecError(f"{packed.pattern} is made of several patterns: hardware has a layout for single ones")
    return part
