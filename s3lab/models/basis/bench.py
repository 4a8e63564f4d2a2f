"""One dense layer under test on a few tokens: what is changed in it, and what it then reads and gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from s3lab.models.prune.flow import Flow
from s3lab.models.structure.decoder import Course, Matrix, Watch, find_course
from s3lab.shapes import Float


@dataclass(frozen=True, eq=False)
class Absorber:
    """Part of a layer whose outputs a vector of factors scales: a norm, or a matrix by its rows, and their bias.

    ``offset`` is 1 for norms that multiply by 1 + weight.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    offset: float = 0.0

    def scale(self, factor: Float[Tensor, " R"]) -> None:
        """Multiply each output by its factor, in place."""
        wide = self.weight.double() + self.offset
        self.weight.copy_(wide * factor.double().view(-1, *[1] * (wide.ndim - 1)) - self.offset)
        if self.bias is not None:
            self.bias.mul_(factor.to(self.bias.dtype))


def find_absorbers(layer: nn.Module, matrices: Mapping[str, Matrix]) -> list[Absorber]:
    """Return all of a layer that could scale an input: its modules with a vector as weight, then its matrices.

    >>> [absorber.name for absorber in find_absorbers(nn.Sequential(nn.LayerNorm(4)), {})]
    ['0', '0']
    """
    found = []
    for name, module in layer.named_modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, Tensor) and weight.ndim == 1:
            found += [Absorber(name, weight.detach(), detach(bias), offset) for offset in (0.0, 1.0)]
    owners = {id(module): name for name, module in layer.named_modules()}
    plain = [matrix for matrix in matrices.values() if matrix.expert is None]
    return found + [rows_of(matrix, owners[id(matrix.module)]) for matrix in plain]


def rows_of(matrix: Matrix, name: str | None = None) -> Absorber:
    """Return a matrix as something that is scaled by its rows, with the bias that they have."""
    bias = None if matrix.expert is not None else getattr(matrix.module, "bias", None)
    return Absorber(name or matrix.name, matrix.weight, detach(bias))


class Bench:
    """A layer of a model, and what the dense stream of a flow brings to it of its first chunk."""

    def __init__(self, flow: Flow, index: int, matrices: Mapping[str, Matrix] | None = None) -> None:
        self.flow, self.index, self.chunk = flow, index, flow.chunks[0]
        self.hidden = flow.get(index, "dense", self.chunk)
        self.layer = flow.decoder.layers[index]
        self.matrices = flow.decoder.matrices[index] if matrices is None else matrices
        # what is the same is so to rounding, and nothing else comes as near
        self.tolerance = torch.finfo(self.hidden.dtype).eps ** 0.5

    @cached_property
    def course(self) -> Course:
        """The way through the layer."""
        hidden = self.hidden.clone().requires_grad_()
        return find_course(self.matrices, lambda: self.run(hidden), self.chunk.ids.numel())

    @property
    def inputs(self) -> list[tuple[Matrix, ...]]:
        """The matrices that share an input, input by input."""
        return [group for stage in self.course.stages for group in stage.groups]

    def run(self, hidden: Tensor | None = None) -> Tensor:
        """Return what the layer makes of its hidden states, or of others."""
        # a layer may write into what it is given
        return self.flow.run(self.index, self.chunk, (self.hidden if hidden is None else hidden).clone())

    def read(self, matrix: Matrix) -> Tensor:
        """Return the input of a matrix, (tokens, K): no tokens where none comes to it."""
        seen: list[Tensor] = [matrix.weight.new_zeros(0, matrix.weight.shape[1])]
        with Watch({matrix.name: matrix}, lambda matrix, x, out: seen.append(x.flatten(0, -2))):
            self.run()
        return torch.cat(seen)

    def close(self, x: Float[Tensor, "t K"], expected: Float[Tensor, "T K"]) -> Tensor:
        """Return which channels of an input are as expected of all tokens, bool (K,); none where tokens are others."""
        if len(x) != len(expected):
            return torch.zeros_like(expected[0], dtype=torch.bool)
        return (x - expected).norm(dim=0) <= self.tolerance * expected.norm(dim=0)

    def gives(self, before: Tensor) -> bool:
        """Return whether the layer gives what it gave ``before``, beside the hidden states that it adds to."""
        moved = (before - self.hidden).double().norm()
        return bool((self.run() - before).double().norm() <= self.tolerance * moved)


@contextmanager
def restored(*parts: Absorber | Matrix) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Put the tensors of the parts back at the end, but for those taken out of the list that is yielded."""
    tensors = [t for part in parts for t in (part.weight, getattr(part, "bias", None)) if t is not None]
    kept = [(tensor, tensor.clone()) for tensor in tensors]
    try:
        yield kept
    finally:
        for tensor, before in kept:
            tensor.copy_(before)


def detach(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor without its history."""
    return None if tensor is None else tensor.detach()
