"""Several layers as one: their weights, and their second moments, along the diagonals of larger ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.stage import Stage
from s3lab.tensors.problem import Problem


@dataclass(frozen=True, eq=False)
class Joint:
    """The leaders of a coupling as one problem, with the one round that decides them all.

    Layers that share their second moment share their columns, the others have their own, so that nothing a solver
    does in one reaches another.  Each is damped by its own mean diagonal.  In the units of the layers.  Made by `join`.
    """

    problem: Problem
    stage: Stage
    places: Mapping[str, tuple[slice, slice]]

    def split(self, W: Tensor) -> dict[str, Tensor]:
        """Return the part (M, K) of each layer in a joint tensor."""
        return {name: W[place].contiguous() for name, place in self.places.items()}


def join(problems: Mapping[str, Problem], bound: CoupledPartition) -> Joint:
    """Return the leaders' problems along one diagonal.  Memory: (ΣM)·(ΣK) + (ΣK)² numbers, over unlike inputs.

    >>> from s3lab import parse
    >>> bound = parse("a: (1,1) & b: (1,1) / (1,2) keep 1").bind({"a": (1, 2), "b": (1, 2)})
    >>> H = torch.eye(2)
    >>> joint = join({name: Problem(torch.ones(1, 2), H) for name in "ab"}, bound)
    >>> joint.problem.shape, joint.stage.offsets.tolist()
    ((2, 2), [[[0, 2], [1, 3]]])
    """
    places: dict[str, tuple[slice, slice]] = {}
    columns: dict[int, slice] = {}
    M = K = 0
    for name in bound.leaders:
        rows, inputs = problems[name].shape
        if id(problems[name].H) not in columns:
            columns[id(problems[name].H)] = slice(K, K + inputs)
            K += inputs
        places[name] = slice(M, M + rows), columns[id(problems[name].H)]
        M += rows
    first = problems[bound.leaders[0]].weight
    W, H = first.new_zeros(M, K), first.new_zeros(K, K)
    for name, place in places.items():
        W[place] = problems[name].weight
        H[place[1], place[1]] = problems[name].hessian
    numbers = torch.arange(M * K, device=W.device).view(M, K)
    offsets = numbers.new_full((bound.S, bound.B, bound.E), -1)
    block = 0
    for group in bound.groups:
        element = 0
        for name, part in group:
            if name in places:
                own = part.blocks(numbers[places[name]])
                offsets[:, block : block + part.B, element : element + part.E] = own
                element += part.E
        block += group[0][1].B
    used = int((offsets >= 0).any(0).any(0).sum())
    goes = numbers.new_full((bound.S,), bound.B - bound.keep)
    return Joint(Problem(W, H, damp=0.0), Stage(bound.text, (M, K), offsets[..., :used].contiguous(), goes), places)
