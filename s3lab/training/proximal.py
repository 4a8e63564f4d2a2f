"""Proximal training: a soft threshold of whole blocks after each step of any optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.partition import Partition
from s3lab.errors import SolveError, SpecError
from s3lab.tensors.proximal import soft_threshold_
from s3lab.training.base import Tensors, Unit
from s3lab.training.ste import STE

_SECOND_MOMENTS = "exp_avg_sq", "square_avg", "sum"  # of Adam, RMSprop and Adagrad, with their kin


@dataclass(frozen=True)
class Proximal(STE):
    """Train all weights as `STE` does, and draw blocks to zero by a proximal step after each step of the optimiser.

        W ← argmin_U  ½ ‖U − W‖²_h + lr · strength · Σ ‖u_block‖

    The sum is over the blocks that the mask would prune, so that nothing is left to draw once W satisfies its pattern
    (the trimmed lasso); with ``trimmed=False`` it is over all blocks, the group lasso.  lr is the optimiser's rate for
    the weight.  With ``adaptive`` the metric h is the root of the second moment that Adam, RMSprop, Adagrad and
    their kin divide a step by; else 1.

    The optimiser must be seen: SolveError unless it is followed, trains the weight, and has a second moment where
    ``adaptive`` asks for one, or for a strength that is negative or not finite; SpecError from `sparse` for patterns
    that decide in rounds.  Cost: that of `s3lab.tensors.proximal.soft_threshold` and a projection a step.

    Source: Bertsimas, Copenhaver and Mazumder, 2017, for the trimmed lasso; Yun, Lozano and Yang, 2021, for the metric.

    >>> import s3lab as s3
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    >>> sparsity = s3.sparse(layer, "2:4", Proximal(strength=1.5))
    >>> sparsity.step(optimizer)
    >>> layer.parametrizations.weight.original.tolist()
    [[0.25, -3.0, 2.0, 0.0]]
    """

    strength: float = 1e-2
    trimmed: bool = True
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not (isfinite(self.strength) and self.strength >= 0):
            raise SolveError(f"strength={self.strength!r}: blocks are drawn to zero by a finite number of at least 0")

    def begin(self, unit: Unit, generator: torch.Generator) -> Tensors:
        if not isinstance(unit.whole, Partition | CoupledPartition):
            raise SpecError(
                f"{', '.join(unit.layers)}: {unit.spec} decides in rounds and has no one set of blocks to draw to "
                "zero: train under one of its parts, or use STE()"
            )
        return super().begin(unit, generator)

    def step(self, unit: Unit, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            raise SolveError(f"{self} takes the rate from the optimiser: call step(optimizer), or follow(optimizer)")
        whole, weights = unit.whole, unit.weights
        assert isinstance(whole, Partition | CoupledPartition)
        groups = [find_group(optimizer, name, W) for name, W in weights.items()]
        level, kept = torch.tensor(float(groups[0]["lr"]) * self.strength), None
        if self.trimmed:
            coupled = isinstance(whole, CoupledPartition)
            squares = unit.squares()
            cost = whole.cost(squares) if coupled else whole.blocks(unit.gather(squares)).sum(-1)
            kept = whole.choose(cost)
            level = level.to(cost) * ~kept
        metric: Any = None
        if self.adaptive:
            pairs = zip(weights.items(), groups, strict=True)
            metric = {name: read_metric(optimizer, group, name, W) for (name, W), group in pairs}
        given: Any = weights
        if isinstance(whole, Partition):
            given, metric = (None if part is None else next(iter(part.values())) for part in (given, metric))
        soft_threshold_(given, whole, level, metric)
        if kept is None:
            super().step(unit, optimizer)
        else:  # what is spared is as it was and the rest no larger: the same blocks are the largest
            masks: Any = whole.scatter(kept)
            unit.put(masks if isinstance(whole, CoupledPartition) else unit.spread(masks))


def find_group(optimizer: torch.optim.Optimizer, name: str, W: Tensor) -> dict[str, Any]:
    """Return the options by which an optimiser trains a weight; SolveError where it does not."""
    for group in optimizer.param_groups:
        if any(p is W for p in group["params"]):
            return group
    raise SolveError(f"{name}: this {type(optimizer).__name__} does not train its weight: give the one that does")


def read_metric(optimizer: torch.optim.Optimizer, group: dict[str, Any], name: str, W: Tensor) -> Tensor:
    """Return by what an adaptive optimiser divides its step for each weight (M, K); SolveError where it does not."""
    state = optimizer.state[W]
    key = next((key for key in _SECOND_MOMENTS if key in state), None)
    if key is None:
        raise SolveError(
            f"{name}: {type(optimizer).__name__} has no second moment: leave adaptive off, or use Adam, RMSprop, "
            "Adagrad or their kin"
        )
    moment = state[key]
    if "betas" in group:
        moment = moment / (1 - group["betas"][1] ** float(state["step"]))
    return moment.sqrt() + group.get("eps", 0.0)
