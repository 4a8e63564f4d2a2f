"""What the choices inside ADMM bring, on generated layers.

    python benchmarks/study_admm.py dual
    python benchmarks/study_admm.py rho
    python benchmarks/study_admm.py variants

The first writes results/admm_dual.csv, errors with V kept as ρ grows and with V/ρ kept; the second
results/admm_rho.csv, errors over multiples of the first ρ; the third results/admm_variants.csv, errors of other ways to
go about it, on ordinary layers and on odd ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

import s3lab as s3
from s3lab.algebra.stage import Stage
from s3lab.files import write
from s3lab.models.measure.layers import Layer, generate_layer
from s3lab.solvers import admm
from s3lab.solvers.fields import find_pieces
from s3lab.solvers.refit import Fit, Refit
from s3lab.tensors.problem import Problem

RESULTS = Path(__file__).parent / "results"
SHAPE, TOKENS, SEEDS, DECAYS = (64, 256), 2048, range(4), (0.5, 1.0, 1.5)
PATTERNS = ["2:4", "8:16", "50%/row", "2:4@1x4", "block16"]
WIDTHS = {1: "2:4", 2: "2:4@1x2", 4: "2:4@1x4", 8: "2:4@1x8", 16: "2:4@1x16"}
FACTORS = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]


class _Unscaled(admm._State):
    """Keeps V/ρ as it is while ρ grows, and so lets the dual V grow with it."""

    def raise_rho(self, growth: float) -> None:
        self._hold(self.rho * growth)


def study_dual(layer: Layer) -> Iterator[dict[str, Any]]:
    """Return the errors of each pattern with and without the rescaling."""
    for pattern, effort in product(PATTERNS, ("quick", "balanced", "thorough")):
        row: dict[str, Any] = {"pattern": pattern, "effort": effort}
        for name, state in (("rescaled", admm._State), ("unscaled", _Unscaled)):
            before, admm._State = admm._State, state
            try:
                found = s3.prune(layer.W, pattern, layer.H, s3.ADMM(effort=effort), H_test=layer.H_test)
            finally:
                admm._State = before
            row |= {name: found.error, f"{name}_test": found.error_test, f"{name}_steps": found.stats["steps"]}
        yield row


def study_rho(layer: Layer) -> Iterator[dict[str, Any]]:
    """Return the errors over multiples of the first ρ, for blocks of each width."""
    for (width, pattern), factor in product(WIDTHS.items(), FACTORS):
        found = s3.prune(layer.W, pattern, layer.H, s3.ADMM(rho=0.07 * factor), H_test=layer.H_test)
        first = s3.prune(layer.W, pattern, layer.H, s3.ADMM(rho=0.07 * factor, max_steps=1)).stats["rho"]
        yield {"pattern": pattern, "width": width, "factor": factor, "first_rho": first} | {
            "error": found.error,
            "error_test": found.error_test,
            "steps": found.stats["steps"],
        }


class _BlockUnits(admm._State):
    """In units where the blocks on H's diagonal are the identity, not its elements alone."""

    def __init__(self, problem: Problem, rho: float, stage: Stage, inertia: float) -> None:
        H, pieces = problem.hessian.double(), find_pieces(stage)
        L = torch.linalg.cholesky(H.masked_fill(pieces != pieces[:, None], 0))
        self.whole, self.back = problem, torch.linalg.inv(L)
        H = self.back @ H @ self.back.T
        W, H = (problem.weight.double() @ L).to(problem.dtype), ((H + H.T) / 2).to(problem.dtype)
        super().__init__(Problem(W, H, damp=0.0), rho, stage, inertia)

    def fit(self, mask: Tensor) -> Fit:
        return Refit()(self.whole, mask, start=(self.D / self.unit).double() @ self.back)


class _ByCost(admm._State):
    """Chooses blocks by what dropping them costs, w_P (C_PP)⁻¹ w_Pᵀ with C = (H + ρI)⁻¹."""

    def advance(self) -> Tensor:
        C = torch.cholesky_inverse(self.factor)
        cost = torch.linalg.inv(C.masked_fill_(self.pieces != self.pieces[:, None], 0))
        return super().advance() + self.sum * (self.sum @ cost) - self.sum.square()


class _Both(_ByCost, _BlockUnits):
    """By cost, in block units."""


class _Relaxed(admm._State):
    """Over-relaxed: 1.6 Ŵ − 0.6 D in place of Ŵ."""

    def advance(self) -> Tensor:
        scores, before = super().advance(), self.sum.square()
        self.sum = self.sum + 0.6 * (self.sum - self.U - self.D)
        return scores + self.sum.square() - before


class _Started(admm._State):
    """Starts from SparseGPT's support."""

    def __init__(self, problem: Problem, rho: float, stage: Stage, inertia: float) -> None:
        super().__init__(problem, rho, stage, inertia)
        self.kept = s3.SparseGPT().solve(problem, stage)[0]
        self.D = self.D * self.kept


class _HalfDual(admm._State):
    """Takes half a step in the dual."""

    def split(self, mask: Tensor) -> None:
        U = (self.U + self.sum * ~mask) / 2  # the mean of the dual before and after
        super().split(mask)
        self.U = U


class _WideRho(admm._State):
    """Raises the first ρ by the root of the width, not by its fourth root."""

    def __init__(self, problem: Problem, rho: float, stage: Stage, inertia: float) -> None:
        super().__init__(problem, rho * stage.width**0.25, stage, inertia)


VARIANTS = {
    "admm": (admm._State, 0.5),
    "no turns": (admm._State, 0.0),
    "longer turns": (admm._State, 0.9),
    "first ρ by the root of the width": (_WideRho, 0.5),
    "block units": (_BlockUnits, 0.5),
    "by cost": (_ByCost, 0.5),
    "by cost in block units": (_Both, 0.5),
    "over-relaxed": (_Relaxed, 0.5),
    "from SparseGPT's support": (_Started, 0.5),
    "half a step in the dual": (_HalfDual, 0.5),
}
ODD = ("twice", "white twice", "few tokens", "flat")
ODD_PATTERNS = ["2:4", "2:4@1x8", "8:16", "block16", "50% columns"]


def draw_odd(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return a weight (32, 64) and the second moment of inputs that repeat each other, are few, or nearly flat."""
    generator = torch.Generator().manual_seed(seed)
    W, X = torch.randn(32, 64, generator=generator), torch.randn(200, 64, generator=generator)
    mix = torch.randn(64, 64, generator=generator)
    if kind == "flat":
        U = torch.linalg.qr(mix.double()).Q
        return W, ((U * torch.logspace(0, -8, 64).double()) @ U.T).float()
    X = X if kind == "white twice" else X @ mix
    if kind == "few tokens":
        return W, s3.hessian(X[:32])
    X[:, 32:] = X[:, :32]
    return W, s3.hessian(X)


def study_variants() -> Iterator[dict[str, Any]]:
    """Return the errors of each variant, and of S-OBS, on ordinary and on odd layers."""
    problems: list[tuple[str, int, Tensor, Tensor]] = []
    for seed in range(2):
        layers = {f"decay {decay:g}": generate_layer(32, 128, 1024, decay=decay, seed=seed) for decay in DECAYS}
        problems += [(name, seed, layer.W, layer.H) for name, layer in layers.items()]
        problems += [(kind, seed, *draw_odd(kind, seed)) for kind in ODD]
    for (layer, seed, W, H), pattern in product(problems, ODD_PATTERNS):
        row = {"layer": layer, "seed": seed, "pattern": pattern}
        yield row | {"variant": "sobs", "error": s3.prune(W, pattern, H, "sobs").error}
        for name, (state, inertia) in VARIANTS.items():
            before, admm._State = admm._State, state
            try:
                found = s3.prune(W, pattern, H, s3.ADMM(inertia=inertia))
            finally:
                admm._State = before
            yield row | {"variant": name, "error": found.error, "steps": found.stats["steps"]}


def over_layers(study: Callable[[Layer], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Return the rows of a study on generated layers of all seeds and decays."""
    for seed, decay in product(SEEDS, DECAYS):
        layer = generate_layer(*SHAPE, TOKENS, decay=decay, seed=seed)
        yield from ({"seed": seed, "decay": decay} | row for row in study(layer))


STUDIES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "dual": lambda: over_layers(study_dual),
    "rho": lambda: over_layers(study_rho),
    "variants": study_variants,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    study = parser.parse_args().study
    rows = []
    for row in STUDIES[study]():
        rows.append(row)
        write(RESULTS / f"admm_{study}.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g").encode())


if __name__ == "__main__":
    main()
