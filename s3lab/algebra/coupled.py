"""The canonical form of a coupling: scopes of blocks that are made of blocks of several tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import comb, prod
from typing import TYPE_CHECKING

from s3lab.algebra.count import index_bits
from s3lab.algebra.layout import Layout
from s3lab.algebra.partition import Partition
from s3lab.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int]


@dataclass(frozen=True)
class CoupledPartition:
    """A coupling on tensors: S scopes of B blocks; a block is made of the blocks of all tensors of its group.

    ``parts`` holds, per group, each tensor's own canonical layout; all groups have S scopes.  Made by `Coupled.bind`.
    """

    text: str
    groups: tuple[tuple[tuple[str, Partition], ...], ...]
    followers: frozenset[str]
    keep: int

    @cached_property
    def parts(self) -> dict[str, Partition]:
        """The canonical layout of each tensor by name."""
        return {name: part for group in self.groups for name, part in group}

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape (M, K) of each tensor by name."""
        return {name: part.shape for name, part in self.parts.items()}

    @property
    def leaders(self) -> tuple[str, ...]:
        """The tensors whose weights a block's cost is the sum over."""
        return tuple(name for name in self.parts if name not in self.followers)

    @property
    def S(self) -> int:
        """Number of scopes."""
        return self.groups[0][0][1].S

    @property
    def B(self) -> int:
        """Number of blocks in a scope, over all groups."""
        return sum(group[0][1].B for group in self.groups)

    @property
    def E(self) -> int:
        """Number of elements in the largest block, over all tensors of its group."""
        return max(sum(part.E for _, part in group) for group in self.groups)

    @property
    def density(self) -> float:
        """Share of the blocks that is kept, which is that of the weights unless groups with unlike blocks share."""
        return self.keep / self.B

    @property
    def storage_bits(self) -> float:
        """Bits per weight that an index takes: ⌈log2 C(B, keep)⌉ a scope, over the weights of all tensors."""
        return index_bits(self.B, self.keep) * self.S / self._weights

    @property
    def storage_rounds(self) -> tuple[tuple[str, float], ...]:
        """The text of each round of the pattern, here one, and the bits per weight of its index."""
        return ((self.text, self.storage_bits),)

    @property
    def bitmask_bits(self) -> float:
        """Bits per weight of a mask with a bit for each block."""
        return self.B * self.S / self._weights

    @property
    def mask_count(self) -> int:
        """Number of masks, C(B, keep)^S, exactly."""
        return comb(self.B, self.keep) ** self.S

    @property
    def _weights(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    def blocks(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Return the weights (M, K) by name as (S, B, E), those of a block side by side, zero where it has fewer."""
        rows = []
        for group in self.groups:
            members = [part.blocks(weights[name]) for name, part in group]
            free = self.E - sum(part.E for _, part in group)
            rows.append(_concat([*members, members[0].new_zeros(self.S, members[0].shape[1], free)], 2))
        return _concat(rows, 1)

    def scatter(self, values: Tensor) -> dict[str, Tensor]:
        """Return weight-shaped tensors by name whose blocks are ``values``, (S, B, E) or (S, B) for whole blocks."""
        out, block = {}, 0
        for group in self.groups:
            own, element = values[:, block : block + group[0][1].B], 0
            for name, part in group:
                out[name] = part.scatter(own if own.ndim == 2 else own[..., element : element + part.E])
                element += part.E
            block += group[0][1].B
        return out

    def cost(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return the sum of element scores (M, K) over the leaders of each block, (S, B)."""
        costs = []
        for group in self.groups:
            own = [part.blocks(scores[name]).sum(-1) for name, part in group if name not in self.followers]
            costs.append(sum(own[1:], start=own[0]))
        return _concat(costs, 1)

    def choose(self, scores: Tensor) -> Tensor:
        """Return which blocks are kept, bool (S, B): the ``keep`` highest of each scope, of equals the first ones."""
        flat = Layout.of(*(Layout((n,)) for n in (self.S, self.B, 1)))
        return Partition(self.text, (self.S, self.B), flat, self.keep).choose(scores)

    def project(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the masks by name of the blocks with the highest sums of element scores over the leaders."""
        return self.scatter(self.choose(self.cost(scores)))

    def check(self, masks: Mapping[str, Tensor]) -> None:
        """Raise SpecError, naming the first scope at fault, unless the bool masks (M, K) by name satisfy the spec."""
        counts = []
        for group in self.groups:
            kept = [part.blocks(masks[name] != 0).long().sum(-1) for name, part in group]
            whole = sum(part.E for _, part in group)
            total = sum(kept[1:], start=kept[0])
            partial = (total > 0) & (total < whole)
            if bool(partial.any()):
                scope, block = divmod(int(partial.reshape(-1).long().argmax()), partial.shape[1])
                told = ", ".join(
                    f"{int(k[scope, block])} of {part.E} in {name}" for k, (name, part) in zip(kept, group, strict=True)
                )
                raise SpecError(f"the masks break {self.text}: of block {block} of scope {scope} they keep {told}")
            counts.append((total == whole).long())
        count = _concat(counts, 1).sum(1)
        if bool((count != self.keep).any()):
            scope = int((count != self.keep).long().argmax())
            raise SpecError(
                f"the masks break {self.text} at scope {scope}: {int(count[scope])} of {self.B} blocks kept, "
                f"not {self.keep}"
            )


def _concat(tensors: list[Tensor], dim: int) -> Tensor:
    """Join tensors of equal other extents along a mode, in their own methods."""
    first = tensors[0]
    shape = list(first.shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    out, at = first.new_empty(shape), 0
    for tensor in tensors:
        out.narrow(dim, at, tensor.shape[dim]).copy_(tensor)
        at += tensor.shape[dim]
    return out
