"""The residual stream of a model: which norms read it for which matrices, and what is added to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from s3lab.errors import DataError
from s3lab.models.basis.bench import Absorber, Bench, restored
from s3lab.models.structure.decoder import OUTPUT, Matrix

_NEAR = 0.02  # of an RMS norm, in any dtype; another norm is nowhere near


@dataclass(frozen=True, eq=False)
class Reading:
    """An RMS norm of the residual stream, and the matrices that read what it gives."""

    norm: Absorber
    readers: tuple[Matrix, ...]

    def fold(self) -> None:
        """Move the weight of the norm into its readers, in place: it multiplies by 1 from then on."""
        gain = self.norm.weight.double() + self.norm.offset
        for matrix in self.readers:
            matrix.weight.copy_(matrix.weight.double() * gain)
        self.norm.weight.fill_(1.0 - self.norm.offset)


@dataclass(frozen=True, eq=False)
class Residual:
    """How one decoder layer reads the residual stream, and the matrices whose outputs it adds to it."""

    readings: tuple[Reading, ...]
    writers: tuple[Matrix, ...]


def find_all_matrices(layer: nn.Module, matrices: Mapping[str, Matrix], name: str) -> dict[str, Matrix]:
    """Return the matrices of a layer called ``name``, and those that are not to be pruned, such as a router."""
    known = {id(getattr(matrix.module, matrix.parameter)) for matrix in matrices.values()}
    others = (
        Matrix(f"{path}.{own}", module, own)
        for path, module in layer.named_modules(prefix=name)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 2 and id(parameter) not in known
    )
    return {**matrices, **{matrix.name: matrix for matrix in others}}


def find_norms(root: nn.Module, width: int, name: str = "") -> Iterator[Absorber]:
    """Yield the norms of ``width`` channels inside a module called ``name``: DataError for one that is no RMS norm.

    >>> [norm.offset for norm in find_norms(nn.ModuleList([nn.RMSNorm(8)]), 8)]
    [0.0]
    """
    for path, module in root.named_modules(prefix=name):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.shape == (width,):
            yield _read_norm(path, module, weight.detach())


def find_residual(bench: Bench, width: int) -> Residual:
    """Return how a layer reads and writes a residual stream of ``width`` channels.

    What reads a norm shows by doubling the norm's weight: its input, with none but writers before it, is then the
    double.  Experts that no token came to go with the others of their parameter.  Raises DataError for a norm that is
    no RMS norm, or that no matrix reads.
    """
    sources = bench.course.sources
    near = [m for name, m in bench.matrices.items() if m.weight.shape[1] == width and name in sources]
    near = [matrix for matrix in near if sources[matrix.name] <= sources[OUTPUT]]
    inputs = {matrix: bench.read(matrix) for matrix in near}
    readings = []
    for norm in find_norms(bench.layer, width, f"{bench.flow.decoder.name}.{bench.index}"):
        with restored(norm):
            norm.scale(torch.full_like(norm.weight, 2.0))
            found = [matrix for matrix, x in inputs.items() if bool(bench.close(bench.read(matrix), 2 * x).all())]
        if not found:
            raise DataError(
                f"{norm.name} is read by no matrix: a norm whose output is added to the residual stream cannot be "
                "folded, and such a model not be rotated"
            )
        readings.append(Reading(norm, _with_siblings(bench, found)))
    writers = [m for name, m in bench.matrices.items() if name in sources[OUTPUT] and m.weight.shape[0] == width]
    return Residual(tuple(readings), _with_siblings(bench, writers))


def _read_norm(name: str, module: nn.Module, weight: Tensor) -> Absorber:
    x = 64 * (1 + torch.randn(8, len(weight), generator=torch.Generator().manual_seed(0))).to(weight)
    unit = x.float() * x.float().square().mean(-1, keepdim=True).rsqrt()
    given = module(x)
    for offset in (0.0, 1.0):
        expected = unit * (weight.float() + offset)
        if (given.float() - expected).norm() <= _NEAR * expected.norm():
            return Absorber(name, weight, None, offset)
    raise DataError(
        f"{name} is a {type(module).__name__}, no RMS norm: only models whose norms take the root mean square can be "
        "rotated, as a rotation keeps no mean"
    )


def _with_siblings(bench: Bench, found: list[Matrix]) -> tuple[Matrix, ...]:
    """Matrices of a layer, with the experts beside those of them that are experts."""
    stacks = {(id(m.module), m.parameter) for m in found if m.expert is not None}
    return tuple(m for m in bench.matrices.values() if m in found or (id(m.module), m.parameter) in stacks)
