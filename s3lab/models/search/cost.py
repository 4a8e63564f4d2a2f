"""What it costs to store or to run weights that a pattern has pruned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from statistics import median
from time import perf_counter

import torch

from s3lab.algebra.couple import Coupled
from s3lab.algebra.spec import Pattern
from s3lab.errors import SpecError
from s3lab.packing.codec import ALONE, bind, pack
from s3lab.packing.file import Entry
from s3lab.packing.linear import PackedLinear

Shapes = Mapping[str, tuple[int, int]]
Cost = Callable[[Pattern | None, Shapes, int], float]


def count_bytes(pattern: Pattern | None, shapes: Shapes, bits: int) -> float:
    """Return the bytes of the values that a pattern keeps of weights of ``bits`` bits each, and of their index.

    weights · (bits · density + index bits) / 8, as `codec.Packed.theory_bits` counts; no pattern keeps all.

    >>> from s3lab import parse
    >>> count_bytes(parse("8:16"), {"": (16, 32)}, 16), count_bytes(None, {"": (16, 32)}, 16)
    (568.0, 1024.0)
    """
    weights = _count(shapes)
    if pattern is None:
        return weights * bits / 8
    bound = bind(pattern, shapes)
    return weights * (bits * bound.density + bound.storage_bits) / 8


def count_weights(pattern: Pattern | None, shapes: Shapes, bits: int) -> float:
    """Return how many weights a pattern keeps; no pattern keeps all.

    >>> from s3lab import parse
    >>> count_weights(parse("8:16"), {"": (16, 32)}, 16)
    256.0
    """
    return _count(shapes) * (1.0 if pattern is None else float(bind(pattern, shapes).density))


@dataclass
class MeasuredTime:
    """Seconds that products of ``tokens`` inputs with the packed weight take on this machine: the median of repeats.

    The weight is random, and each pattern and shape is measured once.  Raises SpecError for a coupling, whose parts
    leave smaller dense weights behind.

    >>> from s3lab import parse
    >>> time = MeasuredTime(tokens=1, repeats=1)
    >>> time(parse("2:4"), {"": (8, 16)}, 32) == time(parse("2:4"), {"": (8, 16)}, 32) > 0
    True
    """

    tokens: int = 1
    repeats: int = 9
    known: dict[tuple[str, tuple[int, int], int], float] = field(default_factory=dict, repr=False)

    def __call__(self, pattern: Pattern | None, shapes: Shapes, bits: int) -> float:
        """Return the seconds of one pattern on one shape."""
        if isinstance(pattern, Coupled):
            raise SpecError(f"{pattern} couples weights, whose time is not measured: count bytes or weights")
        return sum(self._time(pattern, shape, bits) for shape in shapes.values())

    def _time(self, pattern: Pattern | None, shape: tuple[int, int], bits: int) -> float:
        key = (str(pattern), shape, bits)
        if key not in self.known:
            W = torch.randn(shape, dtype=torch.float32 if bits == 32 else torch.bfloat16)
            x = torch.randn(self.tokens, shape[1], dtype=W.dtype)
            layer: torch.nn.Module = torch.nn.Linear(shape[1], shape[0], bias=False).to(W.dtype)
            if pattern is not None:
                W = W * pattern.bind(shape).project(W.float().abs())
                layer = PackedLinear.of(Entry(pack(W, pattern), {ALONE: "weight"}), ALONE)
            with torch.inference_mode():
                layer(x)  # lays the weight out
                self.known[key] = median(self._once(layer, x) for _ in range(self.repeats))
        return self.known[key]

    @staticmethod
    def _once(layer: torch.nn.Module, x: torch.Tensor) -> float:
        began = perf_counter()
        layer(x)
        return perf_counter() - began


COSTS: dict[str, Cost] = {"bytes": count_bytes, "weights": count_weights}


def _count(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))
