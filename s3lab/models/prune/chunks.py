"""Calibration sequences in chunks, some of them held out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s3lab.errors import DataError, ShapeError
from s3lab.shapes import Integer


@dataclass(frozen=True)
class Chunk:
    """Sequences that pass a layer together, all of the calibration or all held out."""

    number: int
    ids: Tensor
    held_out: bool


def cut_chunks(ids: Integer[Tensor, "N L"], held_out: float, batch: int, seed: int) -> list[Chunk]:
    """Return the sequences in chunks of at most ``batch``, a seeded share ``held_out`` of them apart, at least one.

    Raises ShapeError for what is no table of tokens, DataError where one of the two parts would be empty.

    >>> [(len(chunk.ids), chunk.held_out) for chunk in cut_chunks(torch.ones(10, 4).long(), 0.2, batch=5, seed=0)]
    [(5, False), (3, False), (2, True)]
    """
    if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise ShapeError(f"calibration {tuple(ids.shape)}, {ids.dtype}: expected sequences of tokens, int64 (N, L)")
    if not 0 <= held_out < 1 or batch < 1:
        raise DataError(f"held_out = {held_out} and batch = {batch}: a share from 0 below 1, and at least 1 sequence")
    aside = max(1, round(held_out * len(ids))) if held_out else 0
    if aside >= len(ids):
        raise DataError(
            f"{len(ids)} calibration sequences leave none when {aside} are held out: give more, or held_out=0"
        )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    parts = [(part, False) for part in order[aside:].split(batch)]
    parts += [(part, True) for part in order[:aside].split(batch) if aside]
    return [Chunk(number, ids[part.sort().values], held) for number, (part, held) in enumerate(parts)]
