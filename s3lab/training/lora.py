"""LoRA under the mask: a low-rank matrix added to each kept weight, trained in its stead, that leaves zeros at zero."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from s3lab.training.base import LowRank, SparseWeight, cut_off


@dataclass(frozen=True)
class LoRA(LowRank):
    """Freeze a sparse weight, and train a low-rank matrix that is added to what is kept of it.

        Ŵ = mask ⊙ (W + scale · B A),    A (rank, K),    B (M, rank)

    A starts uniform within ±1/√K and B as zeros, as those of peft do, so that training starts at W: rank·(M + K)
    numbers instead of M·K.  The sum is pruned in the forward pass already, so that `densify`, which multiplies out,
    loses nothing; LoRA that is trained beside a sparse weight fills its zeros when it is merged, and pruned only then
    it is not what was trained.  The product under a mask is of any rank.

    Raises SolveError for a rank or a scale that cannot be.

    Source: Hu et al., *LoRA*, 2022; under the mask: Zimmer et al., *PERP*, 2023.

    >>> import s3lab as s3
    >>> layer = torch.nn.Linear(8, 4)
    >>> sparsity = s3.sparse(layer, "2:4", LoRA(rank=2))
    >>> [name for name, p in layer.named_parameters() if p.requires_grad]
    ['bias', 'parametrizations.weight.0.A', 'parametrizations.weight.0.B']
    """

    scale: float = 2.0

    def equip(self, own: SparseWeight, W: Tensor, generator: torch.Generator) -> None:
        uniform = 2 * torch.rand(self.rank, W.shape[1], generator=generator) - 1
        own.A = nn.Parameter((uniform / sqrt(W.shape[1])).to(W))
        own.B = nn.Parameter(W.new_zeros(W.shape[0], self.rank))

    def weigh(self, W: Tensor, own: SparseWeight) -> Tensor:
        A: Any = own.A
        B: Any = own.B
        return cut_off(torch.addmm(W, B, A, alpha=self.scale), own.mask)
