"""The order of channels under which patterns keep most: exchanges of pairs, and assignments of many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from s3lab.algebra.compose import Bound
from s3lab.algebra.partition import Partition
from s3lab.shapes import Float, Integer

_LEAST = 1e-6  # share of all that is kept by which a step must raise it, above rounding
_ENOUGH = 1e-4  # share by which a sweep must raise it for another to follow


@dataclass(frozen=True, eq=False)
class Side:
    """A matrix that channels run through: its pattern, the scores (M, K), and the offsets (U, n) of each channel."""

    part: Bound
    scores: Float[Tensor, "M K"]
    places: Integer[Tensor, "U n"]

    @cached_property
    def content(self) -> Float[Tensor, "U n"]:
        """The scores of each channel."""
        return self.scores.reshape(-1)[self.places]

    def arrange(self, order: Integer[Tensor, " U"]) -> Float[Tensor, "M K"]:
        """Return the scores with channel ``order[u]`` in place u."""
        scores = self.scores.reshape(-1).clone()
        scores[self.places] = self.content[order]
        return scores.view(self.scores.shape)

    def kept(self, order: Integer[Tensor, " U"]) -> float:
        """Return the sum of the scores that the pattern keeps in an order."""
        scores = self.arrange(order)
        return float((scores.double() * self.part.project(scores)).sum())


def find_order(
    sides: Sequence[Side], heads: Integer[Tensor, " U"], *, sweeps: int = 10, seed: int = 0
) -> Integer[Tensor, " U"]:
    """Return an order of channels, each in its head, in which the patterns of all sides keep no less than as it is.

        max over orders π in each head of  Σ_sides Σ_ij S_ij(π) · mask_ij(S(π)),    mask by the side's pattern

    For any pattern: masks held, all channels of a head are assigned to places at once; channels held, masks are chosen
    anew.  Where a channel meets each scope in one block alone, as in N:M, what a place would be worth with another
    channel is known exactly for all at once: max(0, x − θ) beside what the rest keeps, with x the channel's score in a
    block and θ what that must exceed to be kept.  By this, pairs are exchanged, the best first, and then one channel is
    taken out of every group of places that share scopes, and all are assigned anew, until a sweep brings nothing.  Of a
    pattern of several parts it is the price in the first part, and the order counts only if all parts keep more.

    Raises nothing that the patterns do not.  Cost of a sweep: U²·n operations and an assignment of U for each head.

    Source: orders by what a pattern keeps, and exchanges, Pool and Yu, *Channel Permutations for N:M Sparsity*, 2021;
    linear sum assignment, Zhang et al., *Plug-and-Play*, 2024.

    >>> from s3lab import parse
    >>> side = Side(parse("1:2").bind((1, 4)), torch.tensor([[4.0, 3, 2, 1]]), torch.arange(4)[:, None])
    >>> order = find_order([side], torch.zeros(4).long())
    >>> side.kept(torch.arange(4)), side.kept(order)
    (6.0, 7.0)
    """
    start = order = torch.arange(len(heads), device=heads.device)
    first = value = sum(side.kept(order) for side in sides)
    for _ in range(sweeps):
        moved = _reassign(sides, heads, order)
        found = sum(side.kept(moved) for side in sides)
        if found <= value * (1 + _LEAST):
            break
        order, value = moved, found
    rivals = [Rivals.of(side) for side in sides if not is_alike(side)]
    exact = [one for one in rivals if one is not None]
    if exact and len(exact) == len(rivals):
        search = _Exchange(exact, heads, order, torch.Generator().manual_seed(seed))
        for _ in range(sweeps):
            search.sweep()
            found, before = sum(side.kept(search.order) for side in sides), value
            if found > value:
                order, value = search.order.clone(), found
            if found <= before * (1 + _ENOUGH):
                break
    return order if value > first else start


def is_alike(side: Side) -> bool:
    """Return whether what a side keeps is the same in every order: each scope lies in one channel, or in none."""
    if not isinstance(side.part, Partition):
        return False
    part, owner = side.part, torch.full(side.scores.shape, -1.0, dtype=torch.float64, device=side.scores.device)
    owner.view(-1)[side.places] = torch.arange(len(side.places), device=owner.device).double().unsqueeze(1)
    owners = part.blocks(owner).flatten(1)
    return bool((owners == owners[:, :1]).all())


@dataclass(frozen=True, eq=False)
class Rivals:
    """What competes with each channel on a side, where it meets each scope in one block alone.

    ``blocks`` (U, R) are the R blocks that the place of a channel lies in, by scope · B + block, and ``content`` (U, R)
    the score that each channel brings to such blocks.
    """

    side: Side
    part: Partition
    blocks: Integer[Tensor, "U R"]
    content: Float[Tensor, "U R"]

    @classmethod
    def of(cls, side: Side) -> Rivals | None:
        """Return the rivals on a side, None for a pattern of another kind."""
        part = side.part.first_part
        if part.lines is not None or not 0 < part.keep < part.B:
            return None
        numbers = torch.arange(part.S * part.B, device=side.scores.device).view(part.S, part.B)
        ids, order = part.scatter(numbers).reshape(-1)[side.places].sort(1)
        rank = torch.zeros_like(ids).scatter(1, order, _count_up(ids))
        blocks = torch.zeros_like(ids[:, : int(rank.max()) + 1])
        blocks.scatter_(1, _count_up(ids), ids)
        scopes = (blocks // part.B).sort(1).values
        if not torch.equal(rank, rank[:1].expand_as(rank)) or bool((scopes.diff(dim=1) == 0).any()):
            return None
        content = side.scores.new_zeros(blocks.shape).index_add_(1, rank[0], side.content)
        return cls(side, part, blocks, content)

    def price(self, order: Tensor) -> tuple[Tensor, Tensor]:
        """What each place keeps without its channel, (U,), and what a channel must exceed in each block, (U, R)."""
        keep = self.part.keep
        scores = self.part.blocks(self.side.arrange(order)).sum(-1)
        top = scores.topk(keep + 1).values
        inside = scores >= top[:, keep - 1 : keep]
        rest = torch.where(inside, top.sum(1, keepdim=True) - scores, top[:, :keep].sum(1, keepdim=True))
        bar = torch.where(inside, top[:, keep:], top[:, keep - 1 : keep])
        own = scores.reshape(-1)[self.blocks] - self.content[order]
        return rest.reshape(-1)[self.blocks].double().sum(1), bar.reshape(-1)[self.blocks] - own


class _Exchange:
    """An order on its way, of channels whose every exchange has an exact price."""

    def __init__(self, rivals: Sequence[Rivals], heads: Tensor, order: Tensor, generator: torch.Generator) -> None:
        self.rivals, self.order, self.generator = rivals, order.clone(), generator
        self.heads = [(heads == head).nonzero()[:, 0] for head in heads.unique()]
        self.groups = find_groups(rivals)

    def sweep(self) -> None:
        """Exchange pairs in each head, then assign one channel of each group anew, until each has had its turn."""
        for places in self.heads:
            self.swap(places)
            for chosen in self.draw(places):
                self.assign(chosen)

    def offers(self, places: Tensor) -> Float[Tensor, "u u"]:
        """Return what the scopes of each place would keep with the channel that each of the places has now."""
        total = torch.zeros(len(places), len(places), dtype=torch.float64, device=places.device)
        for rivals in self.rivals:
            rest, bar = (found[places].double() for found in rivals.price(self.order))
            content = rivals.content[self.order[places]].double()
            # 2·max(0, x − θ) = |x − θ| + x − θ, summed without a number in memory for each x and θ
            total += (torch.cdist(bar, content, p=1) + content.sum(1) - bar.sum(1, keepdim=True)) / 2
            total += rest.unsqueeze(1)
        return total

    def swap(self, places: Tensor) -> None:
        """Exchange the best pairs, of which no two are in the same groups."""
        offers, group = self.offers(places), self.groups[places]
        own = offers.diagonal()
        gain = offers + offers.T - own.unsqueeze(0) - own.unsqueeze(1)
        gain = gain.masked_fill(group.unsqueeze(0) == group.unsqueeze(1), 0).triu()
        best = gain.view(-1).topk(min(8 * len(places), gain.numel()))
        taken: set[int] = set()
        for value, pair in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            i, j = divmod(pair, len(places))
            both = {int(group[i]), int(group[j])}
            if value > _LEAST * float(own.mean()) and not both & taken:
                taken |= both
                self.order[places[[i, j]]] = self.order[places[[j, i]]]

    def draw(self, places: Tensor) -> Iterator[Tensor]:
        """Yield places of which each group has one, until every place was among them, in random order."""
        shuffled = places[torch.randperm(len(places), generator=self.generator).to(places.device)]
        group, order = self.groups[shuffled].sort(stable=True)
        turn = torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)
        for number in range(int(turn.max()) + 1):
            yield shuffled[order[turn == number]]

    def assign(self, places: Tensor) -> None:
        """Assign the channels in places of different groups to these places anew."""
        offers = self.offers(places)
        chosen = _assign(offers)
        if float(offers.gather(1, chosen[:, None]).sum() - offers.trace()) > _LEAST * float(offers.trace()):
            self.order[places] = self.order[places[chosen]]


def find_groups(rivals: Sequence[Rivals]) -> Integer[Tensor, " U"]:
    """Return for each place the first of those that it shares a scope with, on any side, also by way of others."""
    group = torch.arange(len(rivals[0].blocks), device=rivals[0].blocks.device)
    while True:
        before = group
        for one in rivals:
            scopes = one.blocks // one.part.B
            least = torch.full((one.part.S,), len(group), device=group.device)
            least.scatter_reduce_(0, scopes.reshape(-1), group[:, None].expand_as(scopes).reshape(-1), "amin")
            group = torch.minimum(group, least[scopes].amin(1))
        if torch.equal(group, before):
            return group


def _reassign(sides: Sequence[Side], heads: Tensor, order: Tensor) -> Tensor:
    """Return the order in which the masks as they are keep most."""
    worth = torch.zeros(len(order), len(order), dtype=sides[0].scores.dtype, device=order.device)
    for side in sides:
        mask = side.part.project(side.arrange(order)).reshape(-1)[side.places]
        worth += mask.to(worth) @ side.content.T
    order = order.clone()
    for head in heads.unique():
        places = (heads == head).nonzero()[:, 0]
        order[places] = places[_assign(worth[places][:, places])]
    return order


def _assign(worth: Float[Tensor, "u u"]) -> Integer[Tensor, " u"]:
    """Return the column of each row, each once, of the largest sum."""
    from scipy.optimize import linear_sum_assignment

    _, columns = linear_sum_assignment(worth.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(worth.device)


def _count_up(ids: Integer[Tensor, "U n"]) -> Integer[Tensor, "U n"]:
    """Which of the different numbers of its row each is, of rows in rising order."""
    return torch.cat([torch.zeros_like(ids[:, :1]), (ids.diff(dim=1) != 0).long().cumsum(1)], 1)
