"""Channels inside a decoder layer: which inputs of a matrix are made of which outputs, and can be moved with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from s3lab.errors import DataError
from s3lab.models.basis.bench import Absorber, Bench, restored, rows_of
from s3lab.models.structure.decoder import Matrix
from s3lab.shapes import Integer

_UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Channels:
    """U channels between ``producers`` and ``readers``: what each is in every matrix, and which can change places.

    Channel u is the columns ``columns[u]`` of each reader, and the rows ``rows[name][u]`` of each producer, both (U, ·)
    in one order for all.  Channels of one ``head`` (U,) can change places, and where they are ``linear`` can be mixed.
    """

    readers: tuple[Matrix, ...]
    producers: tuple[Matrix, ...]
    columns: Integer[Tensor, "U q"]
    rows: dict[str, Integer[Tensor, "U p"]]
    heads: Integer[Tensor, " U"]
    linear: bool

    @property
    def sides(self) -> list[tuple[Matrix, Tensor]]:
        """Each matrix, and the offsets (U, n) in it, row by row, of the weights that each channel has there."""
        found = []
        for matrix in self.readers:
            M, K = matrix.weight.shape
            rows = torch.arange(M, device=self.columns.device) * K
            found.append((matrix, (self.columns.unsqueeze(-1) + rows).flatten(1)))
        for matrix in self.producers:
            K = matrix.weight.shape[1]
            inputs = torch.arange(K, device=self.columns.device)
            found.append((matrix, (self.rows[matrix.name].unsqueeze(-1) * K + inputs).flatten(1)))
        return found

    @property
    def absorbers(self) -> list[Absorber]:
        """The producers with their biases."""
        return [rows_of(matrix) for matrix in self.producers]

    def move(self, order: Integer[Tensor, " U"]) -> None:
        """Put channel ``order[u]`` where channel u is, in all matrices, in place: the layer gives what it gave."""
        for matrix, places in self.sides:
            weight = matrix.weight.reshape(-1)
            moved = weight.clone()
            moved[places] = weight[places[order]]
            matrix.weight.copy_(moved.view(matrix.weight.shape))
        for absorber, rows in zip(self.absorbers, self.rows.values(), strict=True):
            if absorber.bias is not None:
                absorber.bias[rows] = absorber.bias[rows[order]]


def find_channels(bench: Bench, group: Sequence[Matrix], head: int | None) -> Channels:
    """Return the channels of the input that a group of matrices shares, on trial: the layer must give what it gave.

    A producer is a matrix of which each input hangs on one output alone: that shows by doubling outputs, and it needs
    no name.  Outputs that are K apart count as one, for K inputs, as those of gate and up in one matrix.  Where the
    input hangs on other matrices as well, as values on queries and keys, channels stay in their head of ``head``
    outputs.  A channel that is always zero on the bench stays where it is.

    Raises DataError where there are none, and tells why.
    """
    if not len(before := bench.read(group[0])):
        raise DataError("no token came to it")
    sources = bench.course.sources.get(group[0].name, frozenset())
    found = {name: _find_owner(bench, group[0], before, bench.matrices[name]) for name in sorted(sources)}
    owners = {name: owner for name, owner in found.items() if owner is not None and (owner != _UNKNOWN).any()}
    if not owners:
        raise DataError("nothing in the layer makes its input channel by channel")
    if len(owners) < len(sources) and head is None:
        raise DataError("its inputs hang on several outputs, and the model tells of no heads")
    owner = torch.stack([*owners.values()]).amax(0)
    if any(bool(((own != _UNKNOWN) & (own != owner)).any()) for own in owners.values()):
        raise DataError(f"{' and '.join(owners)} make its channels in different orders")
    numbers, counts = owner[owner != _UNKNOWN].unique(return_counts=True)
    if (counts != counts[0]).any():
        raise DataError("one output is read more often than another")
    producers = tuple(bench.matrices[name] for name in owners)
    K = len(owner)
    channels = Channels(
        tuple(group),
        producers,
        torch.stack([(owner == number).nonzero()[:, 0] for number in numbers]),
        {m.name: _find_rows(m.weight.shape[0], K, numbers) for m in producers},
        numbers // head if head and len(owners) < len(sources) else torch.zeros_like(numbers),
        len(owners) < len(sources),
    )
    turned = torch.cat([(channels.heads == h).nonzero()[:, 0].flip(0) for h in channels.heads.unique()])
    output = bench.run()
    with restored(*channels.readers, *channels.absorbers):
        channels.move(turned)
        if not bench.gives(output):
            raise DataError(f"what {' and '.join(owners)} make is used by more than these matrices")
    return channels


def _find_rows(M: int, K: int, numbers: Tensor) -> Tensor:
    """The rows (U, p) of a producer of M outputs that are channels of these numbers."""
    return torch.stack([torch.arange(M, device=numbers.device)[number::K] for number in numbers.tolist()])


def _find_owner(bench: Bench, matrix: Matrix, before: Tensor, producer: Matrix) -> Tensor | None:
    """The number of the output that each input of a matrix hangs on, (K,), None if an input hangs on several.

    Outputs are doubled by the bits of their numbers: all with a bit, then all without.  What hangs on one output
    changes in one of the two, what hangs on several in both of some bit, and what is always zero in none.
    """
    M, K = producer.weight.shape[0], matrix.weight.shape[1]
    if max(M, K) % min(M, K):
        return None
    numbers = torch.arange(M, device=before.device) % K
    owner = torch.zeros(K, dtype=torch.long, device=before.device)
    known = torch.zeros_like(owner, dtype=torch.bool)
    for bit in range(max(1, (min(M, K) - 1).bit_length())):
        changed = []
        for digit in (0, 1):
            absorber = rows_of(producer)
            with restored(absorber):
                absorber.scale(1.0 + ((numbers >> bit & 1) == digit))
                changed.append(~bench.close(bench.read(matrix), before))
        if (changed[0] & changed[1]).any():
            return None
        owner += changed[1].long() << bit
        known |= changed[0] | changed[1]
    return owner.where(known, _UNKNOWN)
