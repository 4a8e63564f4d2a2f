"""Search from coarse to fine: budgets moved between matrices as long as the language model itself gets better."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s3lab.errors import SpecError
from s3lab.files import write
from s3lab.models.search.curves import Curves
from s3lab.models.text.reference import perplexity
from s3lab.shapes import Integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rungs = tuple[int, ...]


@dataclass(frozen=True)
class Search:
    """How `evolve` searches: for each of ``steps``, the rungs that a change goes up or down by, so many ``generations``
    of so many ``offspring``; each changes up to ``changes`` ladders downwards.  SpecError unless all are positive.

    >>> Search(steps=(2, 1)).evaluations
    129
    """

    steps: tuple[int, ...] = (4, 2, 1)
    generations: int = 8
    offspring: int = 8
    changes: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = (*self.steps, self.generations, self.offspring, self.changes)
        if not self.steps or min(numbers) < 1:
            raise SpecError(f"{self} searches nothing: give numbers from 1 on")

    @property
    def evaluations(self) -> int:
        """How many choices it looks at, at most."""
        return 1 + len(self.steps) * self.generations * self.offspring


def evolve(
    start: Sequence[int],
    costs: Sequence[Sequence[float]],
    budget: float,
    fitness: Callable[[Rungs], float],
    search: Search,
    tolerance: float,
) -> tuple[Rungs, float]:
    """Return the best choice of rungs that was met, its cost within ``tolerance`` of the budget, and its fitness.

    (1 + λ) evolution: of the parent and its offspring the one of the least fitness is the next parent.  An offspring
    takes some ladders down by up to a step and others up, for no more than that frees.  Steps shrink, so that it
    goes from coarse to fine.  All chance is that of the seed.

    Source: G. Li et al., *Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization*,
    NeurIPS 2025, arXiv 2503.09657; there crossed over too, scored by similarity to the dense model, and with the rungs
    of each finer step solved anew around the best choice of the step before.

    >>> evolve((1, 0), [[1.0, 2.0], [1.0, 2.0]], 3.0, lambda rungs: float(rungs[0]), Search(steps=(1,)), 0.0)
    ((0, 1), 0.0)
    """
    chance, best = Random(search.seed), tuple(start)
    least = fitness(best)
    for step in search.steps:
        for _ in range(search.generations):
            born = (_change(best, costs, budget, step, search.changes, chance) for _ in range(search.offspring))
            fit = [child for child in born if _cost(costs, child) >= (1 - tolerance) * budget]
            scored = [(fitness(child), child) for child in fit]
            least, best = min([(least, best), *scored])
    return best, least


def _cost(costs: Sequence[Sequence[float]], rungs: Rungs) -> float:
    return sum(cost[rung] for cost, rung in zip(costs, rungs, strict=True))


def _change(
    parent: Rungs, costs: Sequence[Sequence[float]], budget: float, step: int, changes: int, chance: Random
) -> Rungs:
    """Take some ladders down, and others up as far as the budget reaches."""
    rungs, order = list(parent), chance.sample(range(len(parent)), len(parent))
    lowered = [item for item in order if rungs[item]][: chance.randint(1, changes)]
    for item in lowered:
        rungs[item] -= min(rungs[item], chance.randint(1, step))
    left = budget - _cost(costs, tuple(rungs))
    for item in (item for item in order if item not in lowered):
        for up in (step, 1):
            to = min(rungs[item] + up, len(costs[item]) - 1)
            more = costs[item][to] - costs[item][rungs[item]]
            if 0 < more <= left:
                rungs[item], left = to, left - more
                break
    return tuple(rungs)


@dataclass
class Perplexities:
    """The perplexity of a model on windows of text with each choice of rungs, put together from stored weights.

    What was measured is kept in the file ``path``.  The model is changed, until `restore`.
    """

    model: PreTrainedModel
    curves: Curves
    windows: Integer[Tensor, "N L"]
    path: Path
    known: dict[str, float] = field(init=False)
    _dense: dict[str, Tensor] = field(init=False)
    _now: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.known = json.loads(self.path.read_bytes()) if self.path.exists() else {}
        self._dense = {name: W.clone() for ladder in self.curves.ladders for name, W in ladder.weights.items()}
        self._now = self._top

    def __call__(self, rungs: Rungs) -> float:
        """Return the perplexity of a choice."""
        key = " ".join(map(str, rungs))
        if key not in self.known:
            self._put(rungs)
            self.known[key] = perplexity(self.model, self.windows)
            write(self.path, json.dumps(self.known).encode())
        return self.known[key]

    def restore(self) -> None:
        """Make the model dense again."""
        self._put(self._top)

    @property
    def _top(self) -> list[int]:
        return [len(ladder.rungs) - 1 for ladder in self.curves.ladders]

    def _put(self, rungs: Sequence[int]) -> None:
        with torch.no_grad():
            for place, (ladder, rung) in enumerate(zip(self.curves.ladders, rungs, strict=True)):
                if rung != self._now[place]:
                    found = self._dense if ladder.rungs[rung].job is None else self.curves.load(ladder, rung)
                    for name, W in ladder.weights.items():
                        W.copy_(found[name])
                    self._now[place] = rung
