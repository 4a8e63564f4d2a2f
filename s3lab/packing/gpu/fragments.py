"""Rows in pairs of which each run of columns has one: weights that pack into a dense operand of half the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s3lab.algebra.partition import Partition
from s3lab.packing.bits import pack_bits, unpack_bits
from s3lab.packing.codec import Places
from s3lab.packing.values import Values
from s3lab.shapes import Float, Integer

STEP = 16  # columns that a tensor core multiplies at once: a run is as many, or a multiple


@dataclass(frozen=True, eq=False)
class Fragments:
    """A weight (M, K) as a dense operand of M/2 rows, of which every run of ``run`` columns stands in one of two rows.

    ``operand`` (M/2, K) are the values as the codec stores them; ``bits`` has a bit for each run of each pair, row by
    row, set where the run is of the second row, as the codec's index has it; ``pairs`` (2, M/2) are the two rows.  Of
    ``mma-m16n8k16`` 16 rows and columns of the operand are the left operand of that instruction, and 32 rows of the
    weight.  Source: S3, arXiv 2604.11315, Figure 1.

    >>> import s3lab as s3
    >>> from s3lab.packing.codec import ALONE, pack
    >>> W = torch.zeros(32, 16)
    >>> W[:8], W[24:] = 1.0, 2.0
    >>> packed = pack(W, "mma-m16n8k16")
    >>> fragments = Fragments.of(packed.places[ALONE], packed.values[ALONE])
    >>> fragments.operand.shape, fragments.bits.tolist(), fragments.pairs[:, [0, 8]].tolist()
    (torch.Size([16, 16]), [0, 255], [[0, 16], [8, 24]])
    """

    operand: Tensor
    bits: Tensor
    pairs: Integer[Tensor, "2 P"]
    run: int

    @classmethod
    def of(cls, places: Places, values: Values) -> Fragments | None:
        """Return this form of a weight on the device of its values, None where the pattern has no such form.

        It has where a scope is two blocks at the same columns of two rows, of which it keeps one, a block is a run of
        columns that a tensor core takes whole, and the scopes of a pair of rows follow each other.
        """
        part, mask = places.layers[0]
        if len(places.layers) > 1 or (found := _find_pairs(part)) is None or values.kind != "same":
            return None
        bits, device = pack_bits(part.blocks(mask)[:, 1, 0].contiguous()), values.data.device
        return cls(values.data.view(-1, part.shape[1]), bits.to(device), found.to(device), part.E)

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return 2 * len(self.operand), self.operand.shape[1]

    def multiply(self, x: Float[Tensor, "T K"]) -> Float[Tensor, "T M"]:
        """Return x Wᵀ in float32, run by run: the twin of the kernel, in plain torch, on the CPU."""
        P, K = self.operand.shape
        runs = K // self.run
        operand, tokens = (t.float().view(len(t), runs, self.run) for t in (self.operand, x))
        products = torch.einsum("pre,tre->tpr", operand, tokens)
        second = unpack_bits(self.bits, P * runs).view(P, runs)
        y = torch.zeros(len(x), 2 * P)
        for rows, own in zip(self.pairs, (~second, second), strict=True):
            y[:, rows] = (products * own).sum(-1)
        return y


def _find_pairs(part: Partition) -> Integer[Tensor, "2 P"] | None:
    """The first and the second rows of the pairs, in the order of scopes; None where scopes are no such pairs."""
    (_, K), run = part.shape, part.E
    if (part.B, part.keep, part.lines) != (2, 1, None) or run % STEP or K % run:
        return None
    offsets = torch.tensor(list(part.layout.offsets())).view(-1, K // run, 2, run)
    rows, columns = offsets // K, offsets % K
    expected = torch.arange(K).view(K // run, 1, run).expand_as(columns)
    if not torch.equal(columns, expected) or not torch.equal(rows, rows[:, :1, :, :1].expand_as(rows)):
        return None
    return rows[:, 0, :, 0].T.contiguous()
