"""A packed weight laid out to run: the values row by row, and a bit for each weight that says which there are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from s3lab.errors import DataError
from s3lab.packing.bits import pack_bits
from s3lab.packing.codec import Places
from s3lab.packing.values import Values


@dataclass(frozen=True, eq=False)
class Rows:
    """A weight (M, K): ``bits`` (M, ⌈K/8⌉) uint8, the first column lowest, ``starts`` (M + 1,) of its rows' values.

    Any rows of it are unpacked without the others, whatever the pattern.  Values that stand in rows already are not
    copied; others are, in the dtype that they stand for.  ``of`` raises DataError for another number of values.

    >>> from s3lab.packing.codec import ALONE, pack
    >>> packed = pack(torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 4]]), "2:4")
    >>> rows = Rows.of(packed.places[ALONE], packed.values[ALONE])
    >>> rows.bits.tolist(), rows.starts.tolist(), rows.unpack(1, 2).tolist()
    ([[5], [12]], [0, 2, 4], [[0.0, 0.0, 3.0, 4.0]])
    """

    shape: tuple[int, int]
    bits: Tensor
    starts: Tensor
    values: Values

    @classmethod
    def of(cls, places: Places, values: Values) -> Rows:
        """Return the layout of values at their places, on the device of the values."""
        mask, device = places.mask, values.data.device
        if int(mask.sum()) != values.count:
            raise DataError(f"{values.count} values are stored where {int(mask.sum())} are kept: pack the model again")
        if not places.in_rows:
            W = places.scatter(values.decode().cpu())
            values = Values("same", values.dtype, values.count, W[mask].to(device))
        padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8))
        bits = pack_bits(padded.flatten()).view(len(mask), -1)
        starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls((mask.shape[0], mask.shape[1]), bits.to(device), starts, values)

    @cached_property
    def runs(self) -> Tensor | None:
        """A bit for each 16 columns in words of 64 (M, 8·⌈K/1024⌉), if those are all kept or all pruned, else None."""
        if self.shape[1] % 16:
            return None
        words = self.bits.view(torch.int16)
        if not bool(((words == 0) | (words == -1)).all()):
            return None
        kept = (words != 0).cpu()
        padded = torch.nn.functional.pad(kept, (0, -kept.shape[1] % 64))
        return pack_bits(padded.flatten()).view(len(kept), -1).to(self.bits.device)

    @cached_property
    def half(self) -> bool:
        """Whether 8 of each 16 columns are kept, as 2:4, 4:8 and 8:16 keep them."""
        if self.shape[1] % 16:
            return False
        counts = self.bits - ((self.bits >> 1) & 0x55)
        counts = (counts & 0x33) + ((counts >> 2) & 0x33)
        counts = (counts + (counts >> 4)) & 0x0F
        return bool((counts[:, ::2] + counts[:, 1::2] == 8).all())

    @cached_property
    def lines(self) -> tuple[Tensor, Tensor] | None:
        """The rows and the columns that are kept, long (n,), if that is all there is to the mask, else None."""
        rows = self.starts.diff().nonzero().flatten()
        if not len(rows) or not bool((self.bits[rows] == self.bits[rows[0]]).all()):
            return None
        first = int(rows[0])
        columns = self.mask(first, first + 1)[0].nonzero().flatten()
        return None if len(rows) == self.shape[0] and len(columns) == self.shape[1] else (rows.to(columns), columns)

    def mask(self, first: int, last: int) -> Tensor:
        """Return which weights of rows ``first`` to ``last`` − 1 are kept, bool."""
        bits = self.bits[first:last]
        mask = (bits.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
        return mask.flatten(1)[:, : self.shape[1]].bool()

    def unpack(self, first: int, last: int) -> Tensor:
        """Return rows ``first`` to ``last`` − 1 of the weight."""
        mask, values = self.mask(first, last), self.values.decode(*self.starts[[first, last]].tolist())
        return values.new_zeros(mask.shape).masked_scatter_(mask, values)
