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
from s3lab.algebra.spec import bind_sizes


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


def run_sparsekit_sobs(W: Tensor, H: Tensor, damp: float, pattern: str = "2:4", **options: str) -> Tensor:
    """Prune a copy of W with SparseKit's true OBS, 16 rows at a time and largest scopes first, in float32.

    ``pattern`` is a spec of one view whose scopes keep a number of blocks; ``options`` are those of theirs.
    """
    from sparsekit import BlockSpec, ScopeSpec, StructuredOBS, View

    spec = s3.parse(pattern)
    assert isinstance(spec, s3.Spec)
    M, K = W.shape
    shape, stride, block, scope = (
        bind_sizes(sizes, M, K) for sizes in (spec.view.shape, spec.view.stride, spec.block.shape, spec.scope.shape)
    )
    weight = Parameter(W.clone())
    obs = StructuredOBS(ScopeSpec(BlockSpec(View(weight, shape, stride), shape=block), shape=scope), H, damp=damp)
    keep = spec.bind((M, K)).keep
    obs.prune_true_obs(nnz=keep, ng=64, order="largest_first", c_dtype=torch.float32, **options)
    return weight.detach()


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
