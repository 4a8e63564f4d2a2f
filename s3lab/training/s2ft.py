"""S²FT: some blocks of a dense weight are chosen and trained, all others stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from s3lab.errors import SolveError
from s3lab.training.base import Method, SparseWeight, Tensors, Unit

Choice = Literal["random", "largest", "smallest"]


@dataclass(frozen=True)
class S2FT(Method):
    """Train the weights that a pattern keeps, as one vector of their own, and freeze the rest: nothing is pruned.

        Ŵ = W outside the mask,    Ŵ = values inside,    ∂L/∂values = ∂L/∂Ŵ inside the mask

    "10% rows" and "10% columns" are the paper's slices, and a coupling chooses channels or heads across layers; any
    pattern will do.  ``choose`` draws the blocks, or takes the "largest" or "smallest".  What an optimiser holds is of
    the size of the values: density·M·K numbers.  `densify` writes them into W.  Raises SolveError for an unknown
    choice.

    Source: Yang et al., *S²FT*, 2024, which permutes the slices together, and so trains them dense; here they stay
    where they are, which computes the same.

    >>> import s3lab as s3
    >>> layer = torch.nn.Linear(4, 6)
    >>> sparsity = s3.sparse(layer, "50% columns", S2FT())
    >>> layer.parametrizations.weight[0].values.shape
    torch.Size([12])
    """

    choose: Choice = "random"
    needs_gradient: ClassVar[bool] = False
    freezes: ClassVar[bool] = True
    prunes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.choose not in get_args(Choice):
            raise SolveError(f"choose={self.choose!r}: use one of {', '.join(get_args(Choice))}")

    def begin(self, unit: Unit, generator: torch.Generator) -> Tensors:
        weights, squares = unit.weights, unit.squares()
        if self.choose == "random":
            squares = {name: torch.rand(W.shape, generator=generator).to(W.device) for name, W in weights.items()}
        sign = -1 if self.choose == "smallest" else 1
        return unit.project({name: sign * score for name, score in squares.items()})

    def equip(self, own: SparseWeight, W: Tensor, generator: torch.Generator) -> None:
        own.values = nn.Parameter(W.detach()[own.mask])

    def weigh(self, W: Tensor, own: SparseWeight) -> Tensor:
        values: Any = own.values
        return W.masked_scatter(own.mask, values)
