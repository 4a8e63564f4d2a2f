"""What two choices inside ADMM bring, on generated layers: the dual rescaled as ρ grows, and the first ρ by the width.

    python benchmarks/study_admm.py dual
    python benchmarks/study_admm.py rho

The first writes results/admm_dual.csv, errors with V kept as ρ grows and with V/ρ kept; the second
results/admm_rho.csv, errors over multiples of the first ρ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

import s3lab as s3
from s3lab.files import write
from s3lab.models.layers import Layer, generate_layer
from s3lab.solvers import admm

RESULTS = Path(__file__).parent / "results"
SHAPE, TOKENS, SEEDS, DECAYS = (64, 256), 2048, range(4), (0.5, 1.0, 1.5)
PATTERNS = ["2:4", "8:16", "50%/row", "2:4@1x4", "block16"]
WIDTHS = {1: "2:4", 2: "2:4@1x2", 4: "2:4@1x4", 8: "2:4@1x8", 16: "2:4@1x16"}
FACTORS = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]


class _Unscaled(admm._Half):
    """Keeps V/ρ as it is while ρ grows, and so lets the dual V grow with it."""

    def raise_rho(self, growth: float) -> None:
        self._hold(self.rho * growth)


def study_dual(layer: Layer) -> Iterator[dict[str, Any]]:
    """Return the errors of each pattern with and without the rescaling."""
    for pattern, effort in product(PATTERNS, ("quick", "balanced", "thorough")):
        row: dict[str, Any] = {"pattern": pattern, "effort": effort}
        for name, half in (("rescaled", admm._Half), ("unscaled", _Unscaled)):
            before, admm._Half = admm._Half, half
            try:
                found = s3.prune(layer.W, pattern, layer.H, s3.ADMM(effort=effort), H_test=layer.H_test)
            finally:
                admm._Half = before
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


STUDIES: dict[str, Callable[[Layer], Iterator[dict[str, Any]]]] = {"dual": study_dual, "rho": study_rho}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    study = parser.parse_args().study
    rows = []
    for seed, decay in product(SEEDS, DECAYS):
        layer = generate_layer(*SHAPE, TOKENS, decay=decay, seed=seed)
        rows += [{"seed": seed, "decay": decay} | row for row in STUDIES[study](layer)]
        write(RESULTS / f"admm_{study}.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g").encode())


if __name__ == "__main__":
    main()
