"""SPP: a low-rank factor on each kept weight, trained in its stead, that leaves zeros at zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s3lab.training.base import LowRank, SparseWeight, cut_off


@dataclass(frozen=True)
class SPP(LowRank):
    """Freeze a sparse weight, and train a low-rank matrix that it is multiplied with.

        Ŵ = mask ⊙ W ⊙ (1 + scale · P),    P_ij = beta_i · alpha_(i mod rank),j

    alpha (rank, K) starts as normal numbers and beta (M, 1) as zeros, so that training starts at W: rank·K + M numbers
    instead of M·K.  P has no more than that rank.  The mask is that of the largest blocks, which on a pruned weight are
    those that pruning kept.  `densify` multiplies out.  Raises SolveError for a rank or a scale that cannot be.

    Source: Lu et al., *SPP*, 2024; that rows take turns over alpha, and how it starts, are our reading.

    >>> import s3lab as s3
    >>> layer = torch.nn.Linear(8, 4)
    >>> sparsity = s3.sparse(layer, "2:4", SPP(rank=2))
    >>> [name for name, p in layer.named_parameters() if p.requires_grad]
    ['bias', 'parametrizations.weight.0.alpha', 'parametrizations.weight.0.beta']
    """

    def equip(self, own: SparseWeight, W: Tensor, generator: torch.Generator) -> None:
        own.alpha = nn.Parameter(torch.randn(self.rank, W.shape[1], generator=generator).to(W))
        own.beta = nn.Parameter(W.new_zeros(W.shape[0], 1))

    def weigh(self, W: Tensor, own: SparseWeight) -> Tensor:
        alpha: Any = own.alpha
        beta: Any = own.beta
        turns = alpha.repeat(-(-len(W) // self.rank), 1)[: len(W)]
        return cut_off(W, own.mask) * (1 + self.scale * beta * turns)
