"""SR-STE: the straight-through estimator with a decay of the pruned weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch import Tensor

from s3lab.errors import SolveError
from s3lab.training.base import Unit
from s3lab.training.ste import STE


@dataclass(frozen=True)
class SRSTE(STE):
    """As `STE`, with the gradient drawn towards zero where a weight is pruned, so that masks change less.

        ∂L/∂W ← ∂L/∂Ŵ + λ (1 − mask) ⊙ W

    ``decay`` λ is added once for each step of the optimiser, however many gradients were accumulated or scaled.
    Raises SolveError for a decay that is negative or not finite.  Source: Zhou et al., 2021, equation 9.

    >>> import torch
    >>> import s3lab as s3
    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    >>> sparsity = s3.sparse(layer, "2:4", SRSTE(decay=0.5))
    >>> layer(torch.zeros(4)).backward()
    >>> sparsity.prepare()
    >>> layer.parametrizations.weight.original.grad.tolist()
    [[0.5, 0.0, 0.0, 0.25]]
    """

    decay: float = 2e-4
    prepares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (isfinite(self.decay) and self.decay >= 0):
            raise SolveError(f"decay={self.decay!r}: the pruned weights decay by a finite number of at least 0")

    def prepare(self, unit: Unit) -> None:
        for name, W in unit.weights.items():
            if isinstance(W.grad, Tensor):
                W.grad.add_(W.masked_fill(unit.masks[name], 0), alpha=self.decay)
