"""The rows of a problem shared out to a group of processes, each with a smaller problem of the same kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from s3lab.algebra.partition import Partition
from s3lab.algebra.stage import Stage
from s3lab.shapes import Integer
from s3lab.tensors.incidence import link, tabulate
from s3lab.tensors.problem import Problem
from s3lab.tensors.processes import ProcessGroup

Work = Callable[..., tuple[Tensor, Tensor, dict[str, Any]]]


@dataclass(frozen=True, eq=False)
class Share:
    """The part of a problem that is this process's: some of its rows, with the one round that decides them.

    ``rows`` are their numbers, ``order`` those of all rows, process by process.  Made by `cut`.
    """

    problem: Problem
    stage: Stage
    rows: Integer[Tensor, " m"]
    order: Integer[Tensor, " M"]

    def join(self, own: Tensor) -> Tensor:
        """Return the tensor (M, K) of which each process has its rows."""
        whole = self.problem.processes.gather(own)
        return torch.empty_like(whole).index_copy_(0, self.order, whole)


def cut(problem: Problem, bound: object, processes: ProcessGroup) -> Share | None:
    """Return this process's share of the rows; rows that a scope or a block ties together stay together.

    None where the pattern cannot be cut: one process alone, rounds that build on each other, fewer groups of rows
    than processes, or groups that are not all alike.  The shares are then alike but for the number of rows, so that
    whatever a solver reads off the pattern, such as an order of the columns, is the same in all of them.

    >>> from s3lab import parse
    >>> from s3lab.tensors.processes import SOLO
    >>> cut(Problem(torch.ones(4, 8)), parse("2:4").bind((4, 8)), SOLO) is None
    True
    """
    if processes.size == 1 or not isinstance(bound, Partition):
        return None
    found = find_row_groups(bound, problem.W.device)
    if found is None or len(found[0]) < processes.size:
        return None
    groups, places = found
    start, stop = (len(groups) * rank // processes.size for rank in (processes.rank, processes.rank + 1))
    rows, K = groups[start:stop].flatten(), problem.shape[1]
    shift = torch.arange(stop - start, device=rows.device).view(-1, 1, 1, 1) * (groups.shape[1] * K)
    moved = (places + shift).flatten(0, 1)
    goes = moved.new_full((len(moved),), bound.B - bound.keep)
    outputs = None if problem.outputs is None else problem.outputs[rows]
    own = replace(problem, W=problem.W[rows], outputs=outputs, processes=processes)
    return Share(own, Stage(bound.text, own.shape, moved, goes, bound.lines), rows, groups.flatten())


@lru_cache(maxsize=8)
def find_row_groups(
    part: Partition, device: torch.device
) -> tuple[Integer[Tensor, "G R"], Integer[Tensor, "s B E"]] | None:
    """Return the rows in groups that no block or scope reaches beyond, and the offsets of the first group's s scopes.

    None where all rows are one group, or where the groups are not all alike.

    >>> from s3lab import parse
    >>> found = find_row_groups(parse("1:2@2x2").bind((4, 4)), torch.device("cpu"))
    >>> [part.tolist() for part in found]
    [[[0, 1], [2, 3]], [[[0, 1, 4, 5], [2, 3, 6, 7]]]]
    """
    M, K = part.shape
    rows = torch.arange(M, device=device)
    offsets = part.stage(rows).offsets
    groups = tabulate(rows, link((offsets // K).view(part.S, -1), M)).items
    G, R = groups.shape
    if G == 1 or part.S % G or bool((groups < 0).any()):
        return None
    place = torch.empty_like(rows).index_copy_(0, groups.flatten(), rows)
    offsets = place[offsets // K] * K + offsets % K  # as if the rows of a group were next to each other
    group = offsets[:, 0, 0].div(R * K, rounding_mode="floor")
    offsets = offsets[group.argsort(stable=True)].view(G, -1, part.B, part.E)
    alike = torch.equal(offsets, offsets[:1] + rows[:G].view(-1, 1, 1, 1) * (R * K))
    return (groups, offsets[0].clone()) if alike else None


def over_rows(
    work: Work, problem: Problem, bound: object, processes: ProcessGroup, *given: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return what ``work(problem, bound, *given)`` does, a mask (M, K), a weight (M, K) and stats, by all of a group.

    Each process works on its share of the rows, also of what is ``given`` (M, K) beside the problem, and ``processes``
    in the stats says how many; what cannot be cut is done in whole by each.
    """
    share = cut(problem, bound, processes)
    if share is None:
        return work(problem, bound, *given)
    mask, weight, stats = work(share.problem, share.stage, *(tensor[share.rows] for tensor in given))
    return share.join(mask), share.join(weight), {**stats, "processes": processes.size}
