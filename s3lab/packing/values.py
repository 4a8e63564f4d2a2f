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

    def decode(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return values ``first`` to ``last`` − 1, all by default; DataError where another number is stored."""
        last = self.count if last is None else last
        data, scales = self.data, self.scales
        if len(data) != (-(-self.count // 2) if self.kind == "int4" else self.count):
            raise DataError(f"{len(data)} numbers are stored for {self.count} values: pack the model again")
        if self.kind == "same":
            return data[first:last]
        if scales is None or len(scales) != -(-self.count // self.group):
            raise DataError(f"scales are missing for {self.count} values in groups of {self.group}: pack again")
        q = data[first:last] if self.kind == "int8" else _split(data[first // 2 : -(-last // 2)])[first % 2 :]
        groups = torch.arange(first, last, device=data.device) // self.group
        return (q[: last - first].float() * scales.float()[groups]).to(self.dtype)


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
