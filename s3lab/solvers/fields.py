"""How the blocks of a stage lie in the rows of a weight: rows alike, columns in play, and what meets in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from math import comb, prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from s3lab.algebra.stage import Stage
from s3lab.tensors.incidence import link, tabulate

Window = tuple[int, int]
_KEPT, _TAKEN = -1, -2  # of a weight in no block: it stays, or an earlier round took it


class Choices(NamedTuple):
    """Ways to empty a scope of B blocks: ``slots`` (c, q) the blocks that go, padded with B, and ``taken`` (c, B)."""

    slots: Tensor
    taken: Tensor

    @property
    def B(self) -> int:
        """Number of blocks in a scope."""
        return self.taken.shape[1]

    @property
    def alike(self) -> bool:
        """Whether all choices take equally many blocks."""
        return not bool((self.slots == self.B).any())

    @classmethod
    def of(cls, B: int, sizes: Sequence[int], most: int, device: torch.device) -> Choices | None:
        """Return all ways to take one of so many blocks, if they are no more than ``most``; else None.

        Of equal choices the first is the one that keeps the first blocks.
        """
        if most < B or sum(comb(B, size) for size in sizes) > most:
            return None
        ways = [way for size in sizes for way in reversed(list(combinations(range(B), size)))]
        most_taken = max(1, *sizes)
        slots = torch.tensor([[*way, *[B] * (most_taken - len(way))] for way in ways], device=device)
        return cls(slots, torch.zeros(len(ways), B + 1, device=device).scatter_(1, slots, 1)[:, :B].bool())

    def best(self, cost: Tensor, there: Tensor, due: Tensor) -> Tensor:
        """Return what goes, bool (n, B), by the cost of each choice (n, c), of the blocks that are ``there`` (n, B)
        exactly as many as are ``due`` (n,)."""
        legal = (self.taken.sum(1) == due[:, None]) & ~(self.taken & ~there[:, None]).any(-1)
        return self.taken[cost.masked_fill(~legal, torch.inf).argmin(1)]


class Batch(NamedTuple):
    """Sets of columns to be weighed, (G, u, c, e): c for each of u units, which are blocks, or scopes with c choices.

    Columns count from the start of a window, padded with -1.  ``units`` (G, u) is a column of each unit.  Both are
    (1, …) where all groups are alike.  ``joint`` says that the units are scopes, and ``alone`` that these are whole
    and different, so that each takes its cheapest choice and no more needs to be asked.
    """

    sets: Tensor
    units: Tensor
    joint: bool
    alone: bool

    def cut(self, own: Tensor) -> Batch:
        """Return the batch of some groups, bool (G,)."""
        sets, units = (x if len(x) == 1 else x[own] for x in (self.sets, self.units))
        return self._replace(sets=sets, units=units)


@dataclass(frozen=True, eq=False)
class Field:
    """Row groups with the same columns in play; the rows of a group share all their blocks, and so one fate.

    ``groups`` (G,) are their numbers among all groups of the stage, ``rows`` (G, R) the rows of each.  ``columns``
    are those with a block, in the order of their visits, then those of which earlier rounds took some weight only.
    ``blocks`` (G, k) says which block the k former are in, -1 for none, and ``taken`` (G, all) what was taken.
    ``windows`` cut the k columns to batches.
    """

    groups: Tensor
    rows: Tensor
    columns: Tensor
    blocks: Tensor
    taken: Tensor | None
    windows: list[Window]
    batches: list[Batch]

    @cached_property
    def single(self) -> bool:
        """Whether no group has more than one block: what it loses then touches no other."""
        return bool(((self.blocks == self.blocks.amax(1, keepdim=True)) | (self.blocks < 0)).all())

    def cut(self, chosen: Tensor) -> Field:
        """Return the field of some groups, bool over all groups of the stage."""
        own = chosen[self.groups]
        return replace(
            self,
            groups=self.groups[own],
            rows=self.rows[own],
            blocks=self.blocks[own],
            taken=None if self.taken is None else self.taken[own],
            batches=[batch.cut(own) for batch in self.batches],
        )


def find_groups(stage: Stage) -> tuple[Tensor, Tensor]:
    """Return the block of each weight, int (M, K), and the group of each row, (M,), numbered by their first rows."""
    blocks = _number_blocks(stage)
    return blocks, _number_rows(blocks)


def find_pieces(stage: Stage) -> Tensor:
    """Return a number for each column, (K,), the same for those that every block of a stage takes together.

    >>> from s3lab import parse
    >>> find_pieces(parse("1:2@1x2").bind((2, 8)).stage(torch.ones(1))).tolist()
    [0, 0, 1, 1, 2, 2, 3, 3]
    """
    return _number_rows(_number_blocks(stage).T)


def _number_blocks(stage: Stage) -> Tensor:
    M, K = stage.shape
    there = stage.offsets >= 0
    numbers = torch.arange(stage.S * stage.B, dtype=torch.int32, device=there.device).view(stage.S, stage.B, 1)
    blocks = numbers.new_full((M * K,), _KEPT)
    blocks[stage.offsets[there]] = numbers.expand(stage.offsets.shape)[there]
    blocks = blocks.view(M, K)
    if stage.pruned is not None:
        blocks.masked_fill_(stage.pruned, _TAKEN)
    return blocks


def _number_rows(blocks: Tensor) -> Tensor:
    """Return a number for each row of blocks (M, K), the same for equal rows, by their first rows.

    Rows are told apart by a hash, their sum under random weights, as `unique` over whole rows would take much longer.
    Every row is then compared with the first one of its hash; should two ever differ, all rows are numbered apart,
    which costs time and changes no result.
    """
    M, K = blocks.shape
    weights = torch.randint(1 << 62, (K,), generator=torch.Generator().manual_seed(0), device="cpu").to(blocks.device)
    hashes = (blocks * weights).sum(1).unique(return_inverse=True)[1]
    rows = torch.arange(M, device=blocks.device)
    first = rows.new_full((M,), M).scatter_reduce_(0, hashes, rows, "amin")[hashes]
    return first.unique(return_inverse=True)[1] if torch.equal(blocks, blocks[first]) else rows


def find_fields(blocks: Tensor, group: Tensor, order: Tensor, windows: list[Window]) -> list[Field]:
    """Return the fields of a stage, without batches, by `find_groups` and the visits: columns (k,), cut to windows."""
    rows = tabulate(torch.arange(len(group), device=group.device), group).items
    sizes = (rows >= 0).sum(1)
    own = blocks[rows[:, 0]]
    busy = own != _KEPT
    first = busy.byte().argmax(1, keepdim=True)
    every = torch.arange(own.shape[1], device=own.device)
    together = link(torch.where(busy, every, first), own.shape[1])[first[:, 0]]
    kinds = tabulate(torch.arange(len(own), device=own.device), together * len(group) + sizes - 1)
    fields = [line[line >= 0] for line in kinds.items]
    return [
        _make_field(own[groups], groups, rows[groups][:, : int(sizes[groups[0]])], order, windows)
        for groups in fields
        if bool((own[groups] >= 0).any())
    ]


def _make_field(own: Tensor, groups: Tensor, rows: Tensor, order: Tensor, windows: list[Window]) -> Field:
    seen, taken = (own >= 0).any(0), own == _TAKEN
    visited = order[seen[order]]
    columns = torch.cat([visited, (taken.any(0) & ~seen).nonzero()[:, 0]])
    reached = pad(seen[order].cumsum(0), (1, 0)).tolist()
    return Field(
        groups,
        rows,
        columns,
        own[:, visited].clamp(min=_KEPT),
        taken[:, columns] if taken.any() else None,
        [(reached[start], reached[stop]) for start, stop in windows],
        [],
    )


def make_batches(fields: list[Field], B: int, choices: Choices | None, room: int) -> list[Field]:
    """Return fields with their batches: of scopes with all choices if the matrices to solve are within ``room``
    numbers a group, of blocks otherwise."""
    made: list[list[Batch]] = [[] for _ in fields]
    for t in range(len(fields[0].windows)):
        blocks = [field.blocks[:, slice(*field.windows[t])] for field in fields]
        pieces = [_gather_blocks(own) for own in blocks]
        batches = [Batch(own[:, :, None], own[..., 0], False, False) for own in pieces]
        if choices is not None:
            joint = [_list_choices(own, columns, choices) for own, columns in zip(blocks, pieces, strict=True)]
            if max(prod(batch.sets.shape[1:]) * batch.sets.shape[3] for batch in joint) <= room:
                scopes = torch.cat([_scopes(own, batch, B) for own, batch in zip(blocks, joint, strict=True)])
                alone = all(batch.alone for batch in joint) and len(scopes.unique()) == len(scopes)
                batches = [batch._replace(alone=alone) for batch in joint]
        for own, batch in zip(made, batches, strict=True):
            own.append(batch)
    return [replace(field, batches=own) for field, own in zip(fields, made, strict=True)]


def _gather_blocks(blocks: Tensor) -> Tensor:
    """The columns of each block in blocks (G, n): (G, m, e), or (1, m, e) where all groups are alike."""
    if bool(((blocks - blocks[:, :1] == blocks[:1] - blocks[:1, :1]) & (blocks >= 0)).all()):
        blocks = blocks[:1]
    (G, n), there = blocks.shape, blocks >= 0
    if not there.any():
        return torch.full((1, 0, 1), -1, device=blocks.device)
    every, step = torch.arange(G * n, device=blocks.device).view(G, n), int(blocks.max()) + 1
    found = tabulate(every[there], (every // n * step + blocks)[there])
    of_group = tabulate(torch.arange(len(found.keys), device=blocks.device), found.keys // step)
    columns = torch.where(found.items < 0, -1, found.items % n)
    pieces = columns.new_full((G, of_group.items.shape[1], columns.shape[1]), -1)
    pieces[of_group.keys] = columns[of_group.items].masked_fill(of_group.items[..., None] < 0, -1)
    return pieces


def _gather_scopes(blocks: Tensor, pieces: Tensor, B: int) -> Tensor:
    """The columns of all blocks of each scope, (G, s, B, e), by those of each block (G, m, e)."""
    if len(pieces) == 1 and bool(((blocks[:, :1] - blocks[0, :1]) % B == 0).all()):
        blocks = blocks[:1]
    pieces = pieces.expand(len(blocks), -1, -1)
    there = pieces[..., 0] >= 0
    if not there.any():
        return pieces.new_full((1, 0, B, 1), -1)
    number = blocks.gather(1, pieces[..., 0].clamp(min=0)).long()[there]
    group = torch.arange(len(blocks), device=blocks.device)[:, None].expand_as(there)[there]
    step = int(blocks.max()) // B + 1
    scopes, place = (group * step + number // B).unique(return_inverse=True)
    place = place - torch.searchsorted(scopes, group * step)
    slots = pieces.new_full((len(blocks), int(place.max()) + 1, B, pieces.shape[2]), -1)
    slots[group, place, number % B] = pieces[there]
    return slots


def _scopes(blocks: Tensor, batch: Batch, B: int) -> Tensor:
    """The scopes of all units of a batch that are there."""
    units = batch.units.expand(len(blocks), -1)
    return (blocks.gather(1, units.clamp(min=0)) // B)[units >= 0]


def _list_choices(blocks: Tensor, pieces: Tensor, choices: Choices) -> Batch:
    """What each choice in each scope would take, by the columns of each block."""
    slots = _gather_scopes(blocks, pieces, choices.B)
    sets = pad(slots, (0, 0, 0, 1), value=-1)[:, :, choices.slots].flatten(3)
    return Batch(sets, slots.flatten(2).amax(-1), True, choices.alike and bool((slots >= 0).all()))
