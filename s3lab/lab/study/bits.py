"""How many bits a pruned model takes for each weight of its matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from s3lab.algebra.patterns import parse

WEIGHT_BITS = 16  # of a weight that is kept


def count_index_bits(matrices: Sequence[Mapping[str, Any]]) -> float:
    """Return the bits a weight that tell which weights are kept, over matrices as the rows of a run name them.

    Dense matrices need none, and whole channels, which leave a smaller dense matrix behind.

    >>> count_index_bits([{"spec": "2:4", "shape": (8, 16)}, {"spec": "dense", "shape": (8, 16)}])
    0.375
    """
    bits = [prod(row["shape"]) * _count(row["spec"], row["shape"]) for row in matrices]
    return sum(bits) / sum(prod(row["shape"]) for row in matrices)


def count_bits(matrices: Sequence[Mapping[str, Any]], weight_bits: int = WEIGHT_BITS) -> float:
    """Return all bits a weight: of what is kept, of the index, and of what surrounds the core of a wrapped matrix.

    >>> count_bits([{"spec": "2:4", "shape": (8, 16), "density": 0.5, "extra": 0.25}])
    12.75
    """
    sizes = [prod(row["shape"]) for row in matrices]
    kept = [size * (row["density"] + row.get("extra", 0.0)) for row, size in zip(matrices, sizes, strict=True)]
    return weight_bits * sum(kept) / sum(sizes) + count_index_bits(matrices)


def _count(spec: str, shape: tuple[int, int]) -> float:
    return 0.0 if spec == "dense" or " keep " in spec else float(parse(spec).bind(shape).storage_bits)
