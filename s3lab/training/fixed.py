"""A fixed mask: what is zero stays zero, and the rest is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from s3lab.errors import SpecError
from s3lab.training.base import Method, SparseWeight, Tensors, Unit, cut_off


@dataclass(frozen=True)
class Fixed(Method):
    """Train the kept weights under a mask that does not change: Ŵ = mask ⊙ W, ∂L/∂W = mask ⊙ ∂L/∂Ŵ.

    ``masks`` (M, K) are bool, by the dotted name of the layer; without them the largest blocks are kept, which on a
    pruned weight are those that pruning kept.  A frozen layer is welcome: its zeros are made, and something beside
    it is trained.  Raises SpecError for a mask that is missing or breaks its pattern, naming the layer.

    >>> import s3lab as s3
    >>> layer = torch.nn.Linear(4, 1)
    >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, -3.0, 2.0, 0.5]]))
    >>> sparsity = s3.sparse(layer, "2:4", Fixed())
    >>> layer.weight.tolist()
    [[0.0, -3.0, 2.0, 0.0]]
    """

    masks: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    needs_gradient: ClassVar[bool] = False

    def begin(self, unit: Unit, generator: torch.Generator) -> Tensors:
        if self.masks is None:
            return super().begin(unit, generator)
        if missing := [name for name in unit.layers if name not in self.masks]:
            raise SpecError(f"no mask is given for {', '.join(missing)}: give one for each layer, or none at all")
        masks = {name: self.masks[name].to(W.device, torch.bool) for name, W in unit.weights.items()}
        unit.check(masks)
        return {name: mask.clone() for name, mask in masks.items()}

    def weigh(self, W: Tensor, own: SparseWeight) -> Tensor:
        return cut_off(W, own.mask)
