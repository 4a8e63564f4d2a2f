"""Orthogonal matrices: of Hadamard's kind for any size, and learned so that importance gathers in few weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn

from s3lab.shapes import Float


def hadamard(n: int, seed: int = 0) -> Float[Tensor, "n n"]:
    """Return an orthogonal matrix whose entries are nearly alike, float64: (H_a ⊗ C_m) · diag(±1), n = a·m, m odd.

    H_a is Sylvester's, of a power of two, over √a; C_m is the cosine transform, 1 where n is a power of two.  Signs are
    drawn with ``seed``.

    >>> hadamard(4).abs().allclose(torch.full((4, 4), 0.5).double())
    True
    """
    m = n // (n & -n)
    j = torch.arange(m, dtype=torch.float64)
    matrix = sqrt(2 / m) * torch.cos(pi / m * (j + 0.5) * j.unsqueeze(1))
    matrix[0] = sqrt(1 / m)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / sqrt(2)
    signs = torch.randint(2, (n,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return matrix * signs


@dataclass(frozen=True, eq=False)
class Reads:
    """Weights (…, M, n) that read what is rotated, and the second moment (…, n, n) of that."""

    W: Float[Tensor, "... M n"]
    H: Float[Tensor, "... n n"]

    def weigh(self, Q: Float[Tensor, "... n n"]) -> Float[Tensor, "... M n"]:
        """Return the importance W_ij² H_jj of each weight once what it reads is x Q."""
        return (self.W @ Q).square() * ((self.H @ Q) * Q).sum(-2, keepdim=True)


@dataclass(frozen=True, eq=False)
class Writes:
    """Weights (…, n, K) that make what is rotated, and the mean squares (K,) of their inputs."""

    W: Float[Tensor, "... n K"]
    h: Float[Tensor, " K"]

    def weigh(self, Q: Float[Tensor, "... n n"]) -> Float[Tensor, "... n K"]:
        """Return the importance W_ij² h_j of each weight once what it makes is turned into x Q."""
        return (Q.mT @ self.W).square() * self.h


Terms = Sequence[Reads | Writes]


def entropy(Q: Float[Tensor, "... n n"], terms: Terms) -> Tensor:
    """Return the mean entropy of importance over the terms, in nats: −Σ p ln p, p = importance over its sum."""
    told = []
    for term in terms:
        importance = term.weigh(Q)
        least = torch.finfo(importance.dtype).tiny
        p = importance / importance.sum().clamp(min=least)
        told.append(-(p * p.clamp(min=least).log()).sum())  # the slope of p ln p at zero has no end
    return torch.stack(told).mean()


def learn(
    shape: tuple[int, ...], layers: Sequence[Terms], *, steps: int = 200, seed: int = 0
) -> tuple[Float[Tensor, "... n n"], float, float]:
    """Return orthogonal matrices (…, n, n) of low entropy of importance, and that entropy without and with them.

        min over orthogonal Q of the mean over layers of `entropy`(Q)

    by Adam from the identity, one layer drawn a step; Q by Cayley's map of torch.  The identity where nothing is
    gained.  Cost of a step: three products of each weight of a layer with Q, and a system of n equations.

    Source: Gu et al., *DenoiseRotator*, arXiv 2505.23049.  There, importance is that of each method, its entropy that
    of rows or columns, and each layer has rotations of its own; here it is W_ij² H_jj, over a whole matrix, and one Q
    goes through all layers, as in Liu et al., *SpinQuant*, arXiv 2405.16406, so that nothing is added to the model.

    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> Q, before, after = learn((4, 4), [[Reads(torch.randn(8, 4), torch.eye(4))]], steps=50)
    >>> after < before
    True
    """
    generator = torch.Generator().manual_seed(seed)
    device = layers[0][0].W.device
    same = torch.eye(shape[-1], device=device).expand(shape).contiguous()
    holder: Any = nn.ParameterDict({"Q": same.clone()})
    nn.utils.parametrizations.orthogonal(holder, "Q", orthogonal_map="cayley")

    def mean(Q: Tensor) -> float:
        return sum(float(entropy(Q, terms)) for terms in layers) / len(layers)

    optimizer = torch.optim.Adam(holder.parameters(), lr=0.1 / sqrt(shape[-1]))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for _ in range(steps):
            terms = layers[int(torch.randint(len(layers), (), generator=generator))]
            optimizer.zero_grad()
            entropy(holder.Q, terms).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        Q, R = torch.linalg.qr(holder.Q.detach().double())  # orthogonal to float64
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
        before, after = mean(same), mean(Q.to(same))
    return (Q, before, after) if after < before else (same.double(), before, before)
