"""The truth in plain torch: what each kernel computes, written to be read and not to be fast."""

from __future__ import annotations

import torch
from torch import Tensor

from s3lab.algebra.choose import keep_highest
from s3lab.shapes import Float


def sweep(
    V: Float[Tensor, "n M"], U: Float[Tensor, "n n"], B: int, C: int, keep: int
) -> tuple[Float[Tensor, "n M"], Float[Tensor, "n M"]]:
    """Return V after a SparseGPT sweep over its n columns, a row for each, and which weights are gone, as 0 or 1.

    V holds w_ij / U_jj, of which the squares are the scores, and U has a diagonal of ones: U_ij / U_jj.  Scopes are B
    blocks of C columns in one row of the weight; each is decided when its first column is reached, and keeps ``keep``
    blocks.  With n = K this is the whole of SparseGPT (Frantar and Alistarh, 2023, Algorithm 1), a column at a time.

    >>> V, gone = sweep(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), B=2, C=1, keep=1)
    >>> V.tolist(), gone.tolist()
    ([[0.0], [1.5]], [[1.0], [0.0]])
    """
    V, gone = V.clone(), torch.zeros_like(V)
    for j in range(len(V)):
        if j % (B * C) == 0:
            cost = V[j : j + B * C].view(B, C, -1).square().sum(1)
            goes = ~keep_highest(cost.T, keep).T
            gone[j : j + B * C] = goes.repeat_interleave(C, 0)
        V[j:] -= torch.outer(U[j, j:], V[j] * gone[j])
    return V, gone
