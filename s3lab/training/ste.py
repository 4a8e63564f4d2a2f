"""The straight-through estimator: the mask follows the weights, and all weights are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from s3lab.training.base import Method, SparseWeight, Unit, pass_through


@dataclass(frozen=True)
class STE(Method):
    """Mask the largest blocks anew after each step, and train all weights as if there were no mask.

        Ŵ = mask(W) ⊙ W,    ∂L/∂W = ∂L/∂Ŵ

    so that a pruned block may grow and come back.  Cost: a projection of W on its pattern a step.  Raises SolveError
    from `sparse` for a frozen layer.  Source: Bengio, Léonard, Courville, 2013, for the estimator.

    >>> import s3lab as s3
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    >>> sparsity = s3.sparse(layer, "2:4", STE())
    >>> layer(torch.ones(4)).backward()
    >>> layer.parametrizations.weight.original.grad.tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """

    def weigh(self, W: Tensor, own: SparseWeight) -> Tensor:
        return pass_through(W, own.mask)

    def step(self, unit: Unit, optimizer: torch.optim.Optimizer | None) -> None:
        unit.put(unit.project(unit.squares()))
