"""The ways to share a budget out: each gives the rung of every ladder, and the facts that it went by."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from s3lab.models.search.curves import Curves
from s3lab.models.search.error import weigh_errors
from s3lab.models.search.evolve import Perplexities, Search, evolve
from s3lab.models.search.knapsack import Choice, choose
from s3lab.models.search.ladder import Ladder
from s3lab.models.search.loss import measure_sensitivity
from s3lab.models.search.owl import aim_by_outliers
from s3lab.models.search.uniform import aim_at_shares, find_plain
from s3lab.models.structure.decoder import Decoder
from s3lab.solvers.base import Solver

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 0.005  # of the budget: how near to it a choice must come


@dataclass(eq=False)
class Task:
    """What the methods are given: ``budget`` is ``share`` of the dense cost, ``windows`` (N, L) is the text that loss
    and perplexity are measured on.  Moments and curves are made when one asks for them.
    """

    model: PreTrainedModel
    decoder: Decoder
    ladders: list[Ladder]
    share: float
    budget: float
    find_moments: Callable[[], Sequence[Path]]
    source: Mapping[str, Any]
    folder: Path
    solver: Solver
    options: Mapping[str, Any]
    windows: Tensor
    search: Search
    tell: Callable[[int, str], object]
    errors: list[list[float]] | None = None

    @cached_property
    def moments(self) -> Sequence[Path]:
        return self.find_moments()

    @property
    def costs(self) -> list[list[float]]:
        return [ladder.costs for ladder in self.ladders]

    def solve(self, kept: bool = False) -> Curves:
        """Have every rung solved, for ``errors``."""
        curves = Curves(
            self.decoder, self.ladders, self.moments, self.source, self.folder / "curves", self.solver, self.options,
            kept, self.tell,
        )  # fmt: skip
        self.errors = curves.measure()
        return curves

    def weigh_by_loss(self) -> tuple[list[list[float]], dict[str, Any]]:
        """Return what the error of each rung, once solved, adds to the loss, and the sensitivities as facts."""
        weights = measure_sensitivity(self.model, self.ladders, self.moments, self.windows)
        return weigh_errors(self.errors or [], weights), {"sensitivity": weights}

    def choose(self, losses: list[list[float]]) -> Choice:
        return choose(self.costs, losses, self.budget)


def _uniform(task: Task) -> tuple[Choice, dict[str, Any]]:
    losses = aim_at_shares(task.ladders, [1.0] * len(task.ladders))
    if (plain := find_plain(task.ladders, task.budget, TOLERANCE)) is None:
        return task.choose(losses), {}
    cost, loss = (sum(row[r] for row, r in zip(rows, plain, strict=True)) for rows in (task.costs, losses))
    return Choice(tuple(plain), cost, loss, 0.0, loss), {}


def _owl(task: Task) -> tuple[Choice, dict[str, Any]]:
    aims = aim_by_outliers(task.ladders, task.moments, task.share)
    return task.choose(aim_at_shares(task.ladders, aims)), {"sparsity": aims}


def _error(task: Task) -> tuple[Choice, dict[str, Any]]:
    task.solve()
    return task.choose(weigh_errors(task.errors or [])), {}


def _loss(task: Task) -> tuple[Choice, dict[str, Any]]:
    task.solve()
    losses, told = task.weigh_by_loss()
    return task.choose(losses), told


def _search(task: Task) -> tuple[Choice, dict[str, Any]]:
    curves = task.solve(kept=True)
    losses, known = task.weigh_by_loss()
    start = task.choose(losses)
    told = [dict(task.source), curves.solves, repr(task.solver), dict(task.options), task.windows.tolist()]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]
    fitness = Perplexities(task.model, curves, task.windows, task.folder / "search" / f"{digest}.json")
    try:
        began = fitness(start.rungs)
        rungs, ended = evolve(start.rungs, task.costs, task.budget, fitness, task.search, TOLERANCE)
    finally:
        fitness.restore()
    cost, loss = (sum(row[r] for row, r in zip(rows, rungs, strict=True)) for rows in (task.costs, losses))
    facts = {**known, "search": repr(task.search), "perplexity_before": began, "perplexity_after": ended}
    return Choice(rungs, cost, loss, start.price, start.bound), facts


METHODS: dict[str, Callable[[Task], tuple[Choice, dict[str, Any]]]] = {
    "uniform": _uniform,
    "owl": _owl,
    "error": _error,
    "loss": _loss,
    "search": _search,
}
