"""RigL: blocks that matter least go, and blocks whose gradient is largest come, at a constant budget."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from s3lab.algebra.choose import keep_highest
from s3lab.algebra.stage import Stage
from s3lab.errors import SolveError
from s3lab.training.base import Method, SparseWeight, Tensors, Unit, pass_through, widen

Start = Literal["random", "largest"]


@dataclass(frozen=True)
class RigL(Method):
    """Train the kept weights, and every ``every`` steps, until ``steps``, exchange blocks.

        drop: of a layer's kept blocks the share  α/2 (1 + cos(π t / steps))  of the least ‖w_block‖
        grow: in each scope, to its budget again, the blocks of the largest ‖∂L/∂Ŵ_block‖

    Blocks just dropped may come back as they were; others come as zeros.  In an exchanging step the weight itself takes
    no step, as in the paper; else its gradient is that of the kept weights.  The paper drops and grows in one scope,
    the layer: "25%".  With ``25%/row`` or 2:4 as many are dropped, wherever they lie, and each scope makes up for its
    own: constant fan-in, SRigL, is the pattern that asks for it, and its loss of whole neurons ``90% rows then
    25%/row``.  ``start`` draws the first mask, or takes the "largest" blocks.

    Gradients of pruned weights are cut off in `Sparsity.prepare`; what clips gradients before that meets them.  Raises
    SolveError for options that cannot be.  Source: Evci et al., 2020; Lasby et al., 2024.

    >>> import s3lab as s3
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -3.0, 0.1, 2.0]]))
    >>> sparsity = s3.sparse(layer, "2:4", RigL(steps=8, every=1, alpha=0.6, start="largest"))
    >>> layer(torch.tensor([5.0, 1.0, 9.0, 1.0])).backward()
    >>> sparsity.prepare()
    >>> layer.weight.tolist()
    [[0.0, -3.0, 0.0, 0.0]]
    >>> sparsity.masks[""].tolist()
    [[False, True, True, False]]
    """

    steps: int = 1000
    every: int = 100
    alpha: float = 0.3
    start: Start = "random"
    prepares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.every < 1 or not 0 < self.alpha <= 1 or self.start not in get_args(Start):
            raise SolveError(
                f"{self}: steps and every are at least 1, alpha above 0 and up to 1, start one of "
                f"{', '.join(get_args(Start))}"
            )

    def begin(self, unit: Unit, generator: torch.Generator) -> Tensors:
        if self.start == "largest":
            return super().begin(unit, generator)
        weights = unit.weights.items()
        return unit.project({name: torch.rand(W.shape, generator=generator).to(W.device) for name, W in weights})

    def weigh(self, W: Tensor, own: SparseWeight) -> Tensor:
        return pass_through(W, own.mask)

    def share(self, steps: int) -> float:
        """Return the share of the kept blocks that is dropped in a step.

        >>> [round(RigL(steps=4).share(t), 3) for t in range(5)]
        [0.3, 0.256, 0.15, 0.044, 0.0]
        """
        return self.alpha / 2 * (1 + cos(pi * steps / self.steps))

    def prepare(self, unit: Unit) -> None:
        now, weights, old = unit.steps + 1, unit.weights, unit.masks
        grads = {name: W.grad for name, W in weights.items() if W.grad is not None}
        if len(grads) == len(weights) and now < self.steps and now % self.every == 0:
            new = self.exchange(unit, {name: widen(grad).square() for name, grad in grads.items()}, self.share(now))
            for name, W in weights.items():
                W.mul_(old[name] & new[name])
                W.grad = None
            unit.put(new)
        else:
            for name, grad in grads.items():
                grad.mul_(old[name])

    def exchange(self, unit: Unit, squared_grads: Tensors, share: float) -> Tensors:
        """Return the masks after a share of the kept blocks is dropped and as many have come."""
        kept = unit.gather({name: mask.float() for name, mask in unit.masks.items()}) > 0
        saliency, pull = unit.gather(unit.squares()), unit.gather(squared_grads)

        def decide(stage: Stage) -> Tensor:
            active = stage.gather(kept)
            worth, wanted = (stage.blocks(scores).sum(-1) for scores in (saliency, pull))
            count = int(active.sum())
            stays = active & keep_highest(
                worth.masked_fill(~active, -torch.inf).view(1, -1), count - int(share * count)
            ).view_as(active)
            # whatever stays comes before whatever grows, and the most salient first
            return stage.choose(_scale(wanted).where(~stays, stage.B + 1 + _scale(worth)))

        return unit.spread(unit.grid.resolve(decide, saliency))


def _scale(scores: Tensor) -> Tensor:
    """Return scores of at least 0 as shares of the largest."""
    return scores / scores.max().clamp(min=torch.finfo(scores.dtype).tiny)
