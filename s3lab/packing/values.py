"""The values that are kept: as they are, or as integers of 8 or 4 bits with a scale for each group of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from s3lab.errors import DataError, SpecError

Kind = Literal["same", "int8", "int4"]
_WIDTH = {"int8": 8, "int4": 4}


@dataclass(frozen=True, eq=False)
class Values:
    """``count`` values of a dtype as they are stored: ``data`` holds them, or integers, two to a byte if of 4 bits.

    Integers q stand for q·s, s the scale of their group, of ``group`` values that follow each other, in the dtype of
    the values.

    >>> values = store_values(torch.tensor([1.0, -0.7, 0.25]), "int4", 2)
    >>> values.decode(), values.bytes
    (tensor([ 1.0000, -0.7143,  0.2500]), 10)
    """

    kind: Kind
    dtype: torch.dtype
    count: int
    data: Tensor
    scales: Tensor | None = None
    group: int = 0

    @property
    def bytes(self) -> int:
        """What is stored, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.data, self.scales) if t is not None)

    @property
    def bits(self) -> float:
        """Bits of a value, with its share of a scale."""
        own = 8.0 * self.dtype.itemsize
        return own if self.kind == "same" else _WIDTH[self.kind] + own / self.group

    def decode(self) -> Tensor:
        """Return the values (count,); DataError where there are not so many."""
        if self.kind == "same":
            return self._expect(self.data)
        q = self.data.view(torch.int8) if self.kind == "int8" else _split(self.data)[: self.count]
        self._expect(q)
        assert self.scales is not None
        if len(self.scales) != -(-self.count // self.group):
            raise DataError(f"{len(self.scales)} scales for {self.count} values in groups of {self.group}: pack again")
        scales = self.scales.to(self.dtype).float().repeat_interleave(self.group)[: self.count]
        return (q.float() * scales).to(self.dtype)

    def _expect(self, found: Tensor) -> Tensor:
        if len(found) != self.count:
            raise DataError(f"{len(found)} values are stored where {self.count} are kept: pack the model again")
        return found


def store_values(values: Tensor, kind: Kind, group: int) -> Values:
    """Return values (n,) stored as a kind says, integers symmetric about zero: |q| ≤ 127, or 7, at a group's largest.

    Raises SpecError for an unknown kind, a group below 1, and for values that are not finite where they are rounded.
    """
    if kind not in get_args(Kind):
        raise SpecError(f"values={kind!r}: use one of {', '.join(get_args(Kind))}")
    if kind == "same":
        return Values(kind, values.dtype, len(values), values.contiguous())
    if group < 1:
        raise SpecError(f"a group of {group} values has no scale: give at least 1")
    if not values.isfinite().all():
        raise SpecError(f"values that are NaN or Inf cannot be rounded to {kind}: keep them as they are")
    top = 2 ** (_WIDTH[kind] - 1) - 1
    padded = torch.nn.functional.pad(values.float(), (0, -len(values) % group)).view(-1, group)
    scales = (padded.abs().amax(1) / top).to(values.dtype)
    steps = scales.float().masked_fill(scales == 0, 1).unsqueeze(1)
    q = (padded / steps).round().clamp(-top, top).flatten()[: len(values)].to(torch.int8)
    return Values(kind, values.dtype, len(values), q if kind == "int8" else _join(q), scales, group)


def _join(q: Tensor) -> Tensor:
    """Integers of 4 bits, two to a byte, the first one low."""
    low, high = torch.nn.functional.pad(q, (0, len(q) % 2)).view(-1, 2).unbind(1)
    return ((low & 15) | (high << 4)).view(torch.uint8)


def _split(data: Tensor) -> Tensor:
    own = data.view(torch.int8)
    return torch.stack([own << 4 >> 4, own >> 4], 1).flatten()
