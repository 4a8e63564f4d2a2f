"""A packed weight laid out to run: the values row by row, and a bit for each weight that says which there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s3lab.packing.bits import pack_bits
from s3lab.packing.codec import Places
from s3lab.packing.values import Values


@dataclass(frozen=True, eq=False)
class Rows:
    """A weight (M, K): ``bits`` (M, ⌈K/8⌉) uint8, the first column lowest, ``starts`` (M + 1,) of its rows' values.

    Any rows of it are unpacked without the others, whatever the pattern.  Values that stand in rows already are not
    copied; others are, in the dtype that they stand for.

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
        mask = places.mask
        device = values.data.device
        if not places.in_rows:
            W = places.scatter(values.decode().cpu())
            values = Values("same", values.dtype, values.count, W[mask].to(device))
        padded = torch.nn.functional.pad(mask, (0, -mask.shape[1] % 8))
        bits = pack_bits(padded.flatten()).view(len(mask), -1)
        starts = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls((mask.shape[0], mask.shape[1]), bits.to(device), starts, values)

    def unpack(self, first: int, last: int) -> Tensor:
        """Return rows ``first`` to ``last`` − 1 of the weight."""
        bits = self.bits[first:last]
        mask = (bits.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
        mask = mask.flatten(1)[:, : self.shape[1]].bool()
        values = self.values.decode(*self.starts[[first, last]].tolist())
        return values.new_zeros(mask.shape).masked_scatter_(mask, values)
