"""A fixed mask: what is zero stays zero, and the rest is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from s3lab.training.base import Method, SparseWeight, cut_off


@dataclass(frozen=True)
class Fixed(Method):
    """Train the kept weights under a mask that does not change: Ŵ = mask ⊙ W, ∂L/∂W = mask ⊙ ∂L/∂Ŵ.

    The mask is that of the largest blocks, which on a pruned weight are those that pruning kept, or one that `sparse`
    is given, which raises SpecError where it breaks the pattern.  A frozen layer is welcome: its zeros are made, and
    something beside it is trained.

    >>> import torch
    >>> import s3lab as s3
    >>> layer = torch.nn.Linear(4, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    >>> sparsity = s3.sparse(layer, "2:4", Fixed())
    >>> layer.weight.tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """

    needs_gradient: ClassVar[bool] = False

    def weigh(self, W: Tensor, own: SparseWeight) -> Tensor:
        return cut_off(W, own.mask)
