"""Block-diagonal matrices on both sides of another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from s3lab.shapes import Float


class Wraps(NamedTuple):
    """A and B of A S B, block-diagonal: ``left`` (M/b, b, b) and ``right`` (K/b, b, b) are their blocks.

    >>> import torch
    >>> wraps = Wraps(torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([[[1.0]], [[10.0]]]))
    >>> wraps.around(torch.ones(2, 2)).tolist(), wraps.before(torch.ones(1, 2)).tolist()
    ([[2.0, 20.0], [3.0, 30.0]], [[1.0, 10.0]])
    """

    left: Float[Tensor, "m b b"]
    right: Float[Tensor, "k b b"]

    @property
    def block(self) -> int:
        """b."""
        return self.left.shape[1]

    @property
    def numbers(self) -> int:
        """How many numbers A and B hold."""
        return self.left.numel() + self.right.numel()

    def around(self, core: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        """Return A S B of a core S, in the dtype of the core."""
        return to_right(to_left(self.left, core.to(self.left.dtype)), self.right).to(core.dtype)

    def before(self, x: Float[Tensor, "T K"]) -> Float[Tensor, "T K"]:
        """Return x Bᵀ: what the core multiplies where A S B multiplies x."""
        return to_right(x, self.right.mT)

    def after(self, y: Float[Tensor, "T M"]) -> Float[Tensor, "T M"]:
        """Return y Aᵀ of what the core gave."""
        return to_right(y, self.left.mT)


def to_left(blocks: Float[Tensor, "m b b"], x: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
    """Return A x for A = diag(blocks)."""
    return (blocks @ x.view(len(blocks), -1, x.shape[1])).reshape(x.shape)


def to_right(x: Float[Tensor, "M K"], blocks: Float[Tensor, "k b b"]) -> Float[Tensor, "M K"]:
    """Return x B for B = diag(blocks)."""
    parts = x.view(len(x), len(blocks), -1).transpose(0, 1)
    return (parts @ blocks).transpose(0, 1).reshape(x.shape)
