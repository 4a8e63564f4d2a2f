"""Bits and words of any width as bytes, the lowest bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from s3lab.errors import DataError

LIMB = 54  # bits of a limb: sums of up to 512 of them are exact in int64
_CHUNK = 1 << 16  # words at a time; a multiple of 8, so that each chunk ends with a whole byte


class Reader:
    """Takes runs of bytes (n,) uint8 off the front of an index; DataError where it is too short or too long.

    >>> reader = Reader(torch.tensor([1, 2, 3], dtype=torch.uint8))
    >>> reader.take(2).tolist(), reader.take(1).tolist(), reader.close()
    ([1, 2], [3], None)
    """

    def __init__(self, data: Tensor) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> Tensor:
        """Return the next ``count`` bytes."""
        if not 0 <= count <= len(self._data) - self._at:
            raise DataError(
                f"the index ends after {len(self._data)} bytes and {self._at + count} are needed: the file is damaged, "
                "pack the model again"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def close(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._data):
            raise DataError(
                f"the index has {len(self._data)} bytes and {self._at} are needed: the file is damaged, pack the model "
                "again"
            )


def pack_bits(bits: Tensor) -> Tensor:
    """Return bool (n,) as ⌈n/8⌉ bytes.

    >>> pack_bits(torch.tensor([True, False, True])).tolist()
    [5]
    """
    return torch.from_numpy(np.packbits(bits.numpy(), bitorder="little"))


def unpack_bits(data: Tensor, count: int) -> Tensor:
    """Return the first ``count`` bits of some bytes, bool (count,): the inverse of `pack_bits`."""
    return torch.from_numpy(np.unpackbits(data.numpy(), count=count, bitorder="little").view(bool))


def pack_words(words: Tensor, width: int) -> Tensor:
    """Return words of ``width`` bits, in limbs of `LIMB` bits, long (n, limbs), as ⌈n·width/8⌉ bytes.

    >>> pack_words(torch.tensor([[5], [2]]), 3).tolist()
    [21]
    """
    place = torch.arange(width)
    parts = [
        pack_bits(((chunk[:, place // LIMB] >> place % LIMB) & 1).bool().flatten()) for chunk in words.split(_CHUNK)
    ]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts])


def unpack_words(data: Tensor, count: int, width: int) -> Tensor:
    """Return ``count`` words of ``width`` bits in limbs, long (count, limbs): the inverse of `pack_words`."""
    words = torch.zeros(count, limbs(width), dtype=torch.long)
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        first = start * width // 8
        bits = unpack_bits(data[first : first + (size * width + 7) // 8], size * width).view(size, width).long()
        for limb in range(words.shape[1]):
            own = bits[:, limb * LIMB : (limb + 1) * LIMB]
            words[start : start + size, limb] = (own << torch.arange(own.shape[1])).sum(1)
    return words


def limbs(width: int) -> int:
    """Return how many limbs a word of ``width`` bits takes, at least one."""
    return max(1, -(-width // LIMB))


def byte_count(bits: int) -> int:
    """Return how many bytes hold so many bits."""
    return -(-bits // 8)
