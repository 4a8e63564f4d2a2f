"""Peers to measure in the same process, where they install; none is a dependency of s3lab.

pip install --no-deps sparsekit==0.1.5          (non-commercial licence)
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import Parameter

import s3lab as s3


def find_peers(W: Tensor, H: Tensor, pattern: str, damp: float) -> dict[str, Callable[[], Tensor]]:
    """Return the peers that take a pattern, by name, ready to run."""
    peers: dict[str, Callable[[], Tensor]] = {
        "ADMM in float64": lambda: s3.prune(W.double(), pattern, H.double(), "admm", damp=damp).weight.float()
    }
    if s3.parse(pattern) == s3.parse("2:4"):
        peers["SparseGPT, column loop"] = lambda: loop_sparsegpt(W, H, damp)
    if find_spec("sparsekit") is None:
        return peers
    import sparsekit

    sparsegpt = {
        "2:4": lambda: sparsekit.sparsegpt_prune(W.clone(), H, 1, 4, damp=damp),
        "2:4@1x2": lambda: sparsekit.sparsegpt_prune(W.clone(), H, 2, 8, damp=damp),
        "coupled-2:4": lambda: sparsekit.sparsegpt_coupled_24(W.clone(), H, damp=damp),
        "block16": lambda: sparsekit.sparsegpt_block16(W.clone(), H, damp=damp),
    }
    if pattern in sparsegpt:
        peers["SparseKit SparseGPT"] = sparsegpt[pattern]
    if pattern == "2:4":
        peers["S-OBS, 16 rows at a time"] = lambda: s3.prune(W, pattern, H, s3.SOBS(rows=16), damp=damp).weight
        peers["SparseKit S-OBS"] = lambda: run_sparsekit_sobs(W, H, damp)
    return peers


def run_sparsekit_sobs(W: Tensor, H: Tensor, damp: float) -> Tensor:
    """Prune a copy of W to 2:4 with SparseKit's true OBS, 16 rows at a time, as it does by default."""
    from sparsekit import BlockSpec, ScopeSpec, StructuredOBS

    parameter = Parameter(W.clone())
    obs = StructuredOBS(ScopeSpec(BlockSpec(parameter, shape=(1, 1)), shape=(1, 4)), H, damp=damp)
    obs.prune_true_obs(nnz=2, ng=64, order="largest_first", c_dtype=torch.float32)
    return parameter.detach()


def loop_sparsegpt(W: Tensor, H: Tensor, damp: float) -> Tensor:
    """Prune a copy of W to 2:4 as SparseGPT is written down: every column in turn, the whole rest updated each time."""
    W = W.clone()
    K = W.shape[1]
    H = H + damp * H.diagonal().mean() * torch.eye(K, dtype=H.dtype, device=H.device)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    pruned = torch.zeros_like(W, dtype=torch.bool)
    for j in range(K):
        if j % 4 == 0:
            cost = (W[:, j : j + 4] / U.diagonal()[j : j + 4]) ** 2
            pruned[:, j : j + 4].scatter_(1, cost.argsort(1)[:, :2], True)
        lost = W[:, j] * pruned[:, j] / U[j, j]
        W[:, j:] -= lost[:, None] * U[j, j:]
    return W.masked_fill(pruned, 0)
