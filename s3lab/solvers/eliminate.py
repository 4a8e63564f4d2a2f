"""Columns of a panel chosen and taken out in one pass over each group, by a compiled kernel.

The truth beside it is `Elimination` and `weigh`, batch by batch, in products of many small matrices.  A group's C on a
panel fits the first caches: `eliminate.cpp` goes through all its batches while it is there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from s3lab.tensors.compiled import build, pointer

_SOURCE = Path(__file__).with_suffix(".cpp")
_TYPES = {torch.float32: "float32", torch.float64: "float64"}


@cache
def find_kernel() -> ctypes.CDLL | None:
    """Return the library of the kernel, made on the first call; None where there is no compiler."""
    try:
        return build(_SOURCE)
    except OSError:
        return None


def take_cheapest(C: Tensor, w: Tensor, sets: Sequence[Tensor], stops: Sequence[int]) -> list[Tensor] | None:
    """Return which set each unit takes, int (G, u), for each batch of units; None where there is no kernel.

    C is (G, n, n) or (1, n, n), w (G, n, R).  Batch t has ``sets[t]`` (G, u, c, e), or (1, u, c, e): c sets for each of
    u units, of e columns each, all before ``stops[t]``, where the columns of the next batch begin.  What a batch takes
    is felt by those behind it.

    >>> C, w = torch.eye(4)[None], torch.tensor([[[3.0], [1.0], [2.0], [5.0]]])
    >>> taken = take_cheapest(C, w, [torch.tensor([[[[0], [1]]]]), torch.tensor([[[[2], [3]]]])], [2, 4])
    >>> taken is None or [best.item() for best in taken] == [1, 0]
    True
    """
    (G, n, R), (c, e) = w.shape, sets[0].shape[2:]
    if w.device.type != "cpu" or w.dtype not in _TYPES or any(own.shape[2:] != (c, e) for own in sets):
        return None
    library = find_kernel()
    if library is None:
        return None
    apart = max(len(own) for own in sets)
    joined = torch.cat([own.expand(apart, -1, -1, -1) for own in sets], 1).int().contiguous()
    counts = [own.shape[1] for own in sets]
    best = w.new_empty(G, sum(counts), dtype=torch.long)
    units = torch.tensor(counts, device=w.device).cumsum(0)
    ends = torch.tensor(stops, device=w.device)
    C, w = C.contiguous(), w.contiguous()
    sizes = map(ctypes.c_int64, (G, n, R, len(sets), c, e))
    getattr(library, f"s3lab_eliminate_{_TYPES[w.dtype]}")(
        *sizes, *map(pointer, (C, w, joined, units, ends, best)), len(C) == 1, apart == 1, torch.get_num_threads()
    )
    return list(best.split(counts, 1))
