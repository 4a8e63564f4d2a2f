"""What a packed model takes, tensor by tensor and by part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from s3lab.packing.decode import tell
from s3lab.packing.file import Entry, read_packed
from s3lab.packing.rows import Rows


@dataclass(frozen=True)
class Line:
    """A tensor of a packed file: the bytes of its ``values``, with their scales, of its ``index``, and of the ``wraps``
    around it, if it is a core.

    ``size`` is that of a weight in bytes, were it dense.  Of a packed matrix ``bits`` are those by weight, as stored,
    ``theory`` those that the algebra counts, and ``path`` says how products with it are computed on this machine.  The
    index of a coupling is with its first matrix, and so are ``bits`` and ``theory`` of it all.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    size: int
    values: int
    spec: str = ""
    index: int = 0
    wraps: int = 0
    bits: float | None = None
    theory: float | None = None
    path: str = ""

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.values + self.index + self.wraps

    @property
    def dense(self) -> int:
        """What the weight takes if it is not packed."""
        return prod(self.shape) * self.size

    @property
    def cells(self) -> tuple[str, ...]:
        """A row of a table."""
        figures = ("" if figure is None else f"{figure:.4f}" for figure in (self.bits, self.theory))
        sizes = f"{self.values:,}", f"{self.index:,}" if self.spec else "", f"{self.wraps:,}" if self.wraps else ""
        return self.name, "×".join(map(str, self.shape)), self.kind, self.spec, *sizes, *figures


def weigh(path: str | Path) -> list[Line]:
    """Return what each tensor of a packed file, or of a folder, takes; DataError as `file.read_packed` does."""
    path = Path(path)
    entries, tensors = read_packed(path, whole=path.is_dir())
    lines = [Line(name, tuple(t.shape), _dtype(t), t.element_size(), t.nbytes) for name, t in tensors.items()]
    return [*lines, *(line for entry in entries for line in _weigh(entry))]


def summarise(lines: list[Line]) -> str:
    """Return in a sentence what a packed model takes, against the dense one."""
    packed = [line for line in lines if line.spec]
    stored, dense = sum(line.bytes for line in packed), sum(line.dense for line in packed)
    rest = sum(line.bytes for line in lines if not line.spec)
    share = f" ({stored / dense:.1%})" if dense else ""
    return (
        f"{len(packed)} matrices packed, {stored:,} bytes where dense ones take {dense:,}{share}; "
        f"{rest:,} bytes of what is dense"
    )


def report(lines: list[Line]) -> str:
    """Return a table of what each tensor takes, the sums by part, a sentence, and how products are computed."""
    packed = [line for line in lines if line.spec]
    values, index, wraps = (sum(getattr(line, part) for line in packed) for part in ("values", "index", "wraps"))
    rest = sum(line.values for line in lines if not line.spec)
    rows = [
        ("tensor", "shape", "values", "spec", "values, B", "index, B", "wraps, B", "bits", "theory"),
        *(line.cells for line in lines),
        ("all that is packed", "", "", "", f"{values:,}", f"{index:,}", f"{wraps:,}", "", ""),
        ("all that is dense", "", "", "", f"{rest:,}", "", "", "", ""),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = []
    for row in rows:
        cells = [f"{cell:>{n}}" if place > 3 else f"{cell:<{n}}" for place, (cell, n) in _number(row, widths)]
        texts.append("  ".join(cells).rstrip())
    ways = [f"{count} of them: {path}" for path, count in Counter(line.path for line in packed).items()]
    return "\n".join([*texts, "", summarise(lines), *ways])


def _weigh(entry: Entry) -> Iterator[Line]:
    packed = entry.packed
    around = 0 if entry.wraps is None else sum(blocks.nbytes for blocks in entry.wraps)
    extra = 8 * around / packed.weights
    for number, (key, name) in enumerate(entry.names.items()):
        values, first = packed.values[key], number == 0
        yield Line(
            name,
            packed.shapes[key],
            _dtype(values.data) if values.kind == "same" else values.kind,
            values.dtype.itemsize,
            values.bytes,
            str(packed.pattern),
            len(packed.index) if first else 0,
            around,
            packed.bits_per_weight + extra if first else None,
            packed.theory_bits + extra if first else None,
            tell(Rows.of(packed.places[key], values)),
        )


def _number(row: tuple[str, ...], widths: list[int]) -> Iterator[tuple[int, tuple[str, int]]]:
    return enumerate(zip(row, widths, strict=True))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
