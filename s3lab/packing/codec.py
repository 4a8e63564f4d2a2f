"""One codec for every pattern: the values that are kept, and an index that tells where they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from s3lab.algebra.compose import Bound, Nested, Salient
from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.layout import Layout
from s3lab.algebra.partition import Partition
from s3lab.algebra.patterns import parse
from s3lab.algebra.sizes import INPUTS, ONE, ROWS
from s3lab.algebra.spec import Block, Pattern, Scope, Spec, View
from s3lab.algebra.stage import Stage
from s3lab.errors import DataError, ShapeError, SpecError
from s3lab.packing.bits import Reader
from s3lab.packing.index import read_choice, write_choice
from s3lab.packing.support import LIVE, Round, core, find_kept, grade, salient_parts, settle
from s3lab.packing.values import Kind, Values, store_values

ALONE = ""  # the name of a weight that is packed by itself
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Places:
    """Where the values of a weight stand: masks (M, K) of what is kept, each with the layout that gives the order."""

    layers: tuple[tuple[Partition, Tensor], ...]

    @property
    def mask(self) -> Tensor:
        """All that is kept, bool (M, K)."""
        return torch.stack([mask for _, mask in self.layers]).any(0)

    @property
    def in_rows(self) -> bool:
        """Whether the order is that of the weight, row by row."""
        first, mask = self.layers[0]
        return len(self.layers) == 1 and first.layout.coalesce() == Layout(mask.numel(), 1)

    def gather(self, W: Tensor) -> Tensor:
        """Return the values (n,) that are kept of a weight (M, K), in order."""
        bits = W.view(_BITS[W.element_size()])
        return torch.cat([part.blocks(bits)[part.blocks(mask)] for part, mask in self.layers]).view(W.dtype)

    def scatter(self, values: Tensor) -> Tensor:
        """Return the weight (M, K) of the values (n,), zero elsewhere: the inverse of `gather`, bit by bit.

        Raises DataError for another number of values.
        """
        bits, at = values.view(_BITS[values.element_size()]), 0
        if (kept := sum(int(mask.sum()) for _, mask in self.layers)) != len(bits):
            raise DataError(f"the index keeps {kept} weights and there are {len(bits)} values: pack the model again")
        out = bits.new_zeros(self.layers[0][1].shape)
        for part, mask in self.layers:
            there = part.blocks(mask)
            own = bits[at : at + int(there.sum())]
            out = torch.where(mask, part.scatter(bits.new_zeros(there.shape).masked_scatter_(there, own)), out)
            at += len(own)
        return out.view(values.dtype)


@dataclass(frozen=True, eq=False)
class Packed:
    """A pruned weight, or several that one coupling prunes, as the values that are kept and one index.

    ``values`` are by the names that the pattern has for the tensors, `ALONE` where it is of one, in the order of
    scopes, blocks and elements; those of salient blocks come first.  ``index``, uint8 (bytes,), has the choice of each
    round of the pattern, one after the other, as `write_choice` writes it: the salient blocks, then the rest; of
    ``then`` the first part and then the second on what that left; of a coupling one choice for all its tensors.

    ``bits_per_weight`` is what it takes in all, ``theory_bits`` what the algebra counts for it.

    >>> packed = pack(torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 4]]).bfloat16(), "2:4")
    >>> packed.values[ALONE].decode().tolist(), packed.index.tolist()
    ([1.0, 2.0, 3.0, 4.0], [41])
    >>> packed.unpack().tolist()
    [[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 3.0, 4.0]]
    """

    pattern: Pattern
    shapes: Mapping[str, Shape]
    values: Mapping[str, Values]
    index: Tensor

    @property
    def weights(self) -> int:
        """The number of weights, kept or not."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits that values and index take, by the number of weights."""
        return 8 * (sum(own.bytes for own in self.values.values()) + len(self.index)) / self.weights

    @property
    def theory_bits(self) -> float:
        """What the algebra counts: the bits of the values that are kept, and `storage_bits` of the pattern."""
        kept = sum(own.count * own.bits for own in self.values.values())
        return kept / self.weights + bind(self.pattern, self.shapes).storage_bits

    @cached_property
    def places(self) -> dict[str, Places]:
        """Where the values of each name stand; DataError where the index tells of no mask of the pattern."""
        return read_places(self.pattern, self.shapes, self.index)

    def masks(self) -> dict[str, Tensor]:
        """Return the masks (M, K) by name, True = kept."""
        return {name: own.mask for name, own in self.places.items()}

    def unpack(self) -> Tensor | dict[str, Tensor]:
        """Return the weight (M, K), or the weights by name, as they were packed, bit by bit but for signs of zeros
        that were not kept; DataError where the bytes are of no such weight."""
        found = {name: self.unpack_one(name) for name in self.values}
        return found[ALONE] if list(found) == [ALONE] else found

    def unpack_one(self, name: str) -> Tensor:
        """Return the weight (M, K) of one name."""
        return self.places[name].scatter(self.values[name].decode())


def pack(
    W: Tensor | Mapping[str, Tensor], pattern: str | Pattern, *, values: Kind = "same", group: int = 128
) -> Packed:
    """Return a pruned weight (M, K), or the weights of a coupling by name, packed by the pattern that pruned them.

    What is kept is found from the zeros: a scope with fewer blocks that are not zero than it keeps is completed, the
    first ones first.  Zeros do not always tell what the parts of a composed pattern kept: salient blocks are found so
    that the rest fits, and where a choice cannot be found for a weight of no more than the budget, the pattern of the
    result is the plain count, ``(M,K):(K,1) / (1,1) / (M,K) keep n``.  ``values`` are stored as they are ("same"), or
    in "int8" or "int4" with a scale for each ``group`` of them.  All happens on the CPU.

    Raises SpecError for a weight that is not pruned so, naming the first scope, and ShapeError for what is no weight.
    """
    pattern = parse(pattern) if isinstance(pattern, str) else pattern
    weights = dict(W) if isinstance(W, Mapping) else {ALONE: W}
    for name, own in weights.items():
        if own.ndim != 2 or not own.is_floating_point():
            raise ShapeError(
                f"a tensor {name} of shape {tuple(own.shape)} and {own.dtype} cannot be packed: expected real (M, K)"
            )
    weights = {name: own.detach().cpu().contiguous() for name, own in weights.items()}
    shapes = {name: (own.shape[0], own.shape[1]) for name, own in weights.items()}
    grades = {name: grade(own) for name, own in weights.items()}
    bound = bind(pattern, shapes)
    try:
        pieces, places = _write(bound, grades)
    except SpecError:
        live = int((grades.get(ALONE, torch.empty(0)) == LIVE).sum())
        if not isinstance(bound, Nested | Salient) or live > round(bound.density * prod(bound.shape)):
            raise
        pattern = Spec(View(), Block((ONE, ONE)), Scope((ROWS, INPUTS), keep=max(live, 1)))
        pieces, places = _write(bind(pattern, shapes), grades)
    stored = {name: store_values(places[name].gather(own), values, group) for name, own in weights.items()}
    return Packed(pattern, shapes, stored, torch.cat([torch.empty(0, dtype=torch.uint8), *pieces]))


def read_places(pattern: Pattern, shapes: Mapping[str, Shape], index: Tensor) -> dict[str, Places]:
    """Return where an index says that values stand, by name; DataError where it is none of the pattern."""
    reader = Reader(index)
    found = _read(bind(pattern, shapes), reader)
    reader.close()
    return found


def bind(pattern: Pattern, shapes: Mapping[str, Shape]) -> Bound | CoupledPartition:
    """Return a pattern on the shapes of its tensors by name, of which `ALONE` is the only one where it is of one."""
    return pattern.bind(shapes if pattern.names else shapes[ALONE])


def _write(bound: Bound | CoupledPartition, grades: Mapping[str, Tensor]) -> tuple[list[Tensor], dict[str, Places]]:
    """The choices of all rounds in bytes, and what they keep."""
    pieces: list[Tensor] = []

    def put(found: Round, kept: Tensor) -> Tensor:
        pieces.append(write_choice(kept, found.keep, found.present, found.lines))
        return kept if found.present is None else kept & found.present

    if isinstance(bound, CoupledPartition):
        found = Round.of(bound)
        return pieces, _lay_out(bound, bound.scatter(put(found, find_kept(found, grades))))
    own = grades[ALONE]
    if isinstance(bound, Salient):
        bound = settle(bound, own)
        for layer in salient_parts(bound):
            assert layer.chosen is not None
            put(Round.of(layer.salient), layer.salient.blocks(layer.chosen).all(-1))
    if isinstance(bound, Partition):
        found = Round.of(bound)
        return pieces, _lay_out(bound, bound.scatter(put(found, find_kept(found, own))))

    def decide(stage: Stage) -> Tensor:
        found = Round.at(stage)
        return put(found, find_kept(found, own))

    return pieces, _lay_out(bound, bound.resolve(decide, own.float()))


def _read(bound: Bound | CoupledPartition, reader: Reader) -> dict[str, Places]:
    """What the choices in an index keep: the inverse of `_write`."""

    def take(found: Round) -> Tensor:
        kept = read_choice(reader, found.shape, found.keep, found.present, found.lines)
        return kept if found.present is None else kept & found.present

    if isinstance(bound, Partition | CoupledPartition):
        return _lay_out(bound, bound.scatter(take(Round.of(bound))))
    if isinstance(bound, Salient):
        bound = _read_salient(bound, take)
    return _lay_out(bound, bound.resolve(lambda stage: take(Round.at(stage)), torch.zeros(bound.shape)))


def _read_salient(bound: Salient, take: Callable[[Round], Tensor]) -> Salient:
    chosen = bound.salient.scatter(take(Round.of(bound.salient)))
    main = _read_salient(bound.main, take) if isinstance(bound.main, Salient) else bound.main
    return replace(bound, main=main, chosen=chosen)


def _lay_out(bound: Bound | CoupledPartition, mask: Tensor | dict[str, Tensor]) -> dict[str, Places]:
    """What is kept by name: the salient blocks of each layer, and the rest in the order of the main part's scopes."""
    if isinstance(mask, dict):
        assert isinstance(bound, CoupledPartition)
        return {name: Places(((bound.parts[name], own),)) for name, own in mask.items()}
    assert not isinstance(bound, CoupledPartition)
    layers, rest = [], mask
    for layer in salient_parts(bound) if isinstance(bound, Salient) else []:
        assert layer.chosen is not None
        layers.append((layer.salient, rest & layer.chosen))
        rest = rest & ~layer.chosen
    main = core(bound)
    return {ALONE: Places((*layers, (main.first if isinstance(main, Nested) else main, rest)))}
