"""S-OBS against SparseKit's, on seeded layers in one process: error, time and memory, as ratios.

    pip install --no-deps sparsekit==0.1.5
    python benchmarks/compare_sobs.py [--size 384 1536] [--size 96 3072] [--repeats 3]
    python benchmarks/compare_sobs.py --unseen 10

Prints a table for each size, M and K, and appends to benchmarks/results/compare_sobs.csv.  ``--unseen`` compares errors
on so many of the layers that `compare_solvers.py --suite unseen` draws, on three patterns whose blocks or scopes are
wider than a weight, into compare_sobs_unseen.csv.  SparseKit is under a
non-commercial licence and is no dependency of s3lab.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from compare_solvers import draw_unseen
from facts import describe
from peers import run_sparsekit_sobs
from tqdm import tqdm

import s3lab as s3
from s3lab.files import write
from s3lab.models.measure.layers import generate_layer
from s3lab.tensors.meter import Meter

RESULTS = Path(__file__).parent / "results" / "compare_sobs.csv"
WIDE = ["block16", "coupled-2:4", "2:4@1x2"]


def compare(M: int, K: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each method on one layer, SparseKit's first."""
    layer = generate_layer(M, K, args.tokens)
    ours = {"s3lab S-OBS, rows=16": s3.SOBS(rows=16), "s3lab S-OBS": s3.SOBS()}
    methods = {"sparsekit S-OBS, rows=16": lambda: run_sparsekit_sobs(layer.W, layer.H, args.damp)} | {
        name: lambda solver=solver: s3.prune(layer.W, "2:4", layer.H, solver, damp=args.damp).weight
        for name, solver in ours.items()
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    memory: dict[str, list[float]] = {name: [] for name in methods}
    errors: dict[str, float] = {}
    for _ in range(args.repeats):  # alternating, so that a busy machine weighs on both
        for name, method in methods.items():
            with Meter("cpu") as meter:
                W_hat = method()
            s3.parse("2:4").check(W_hat != 0)
            times[name].append(meter.time_s)
            memory[name].append(meter.mem_mib or float("nan"))
            errors[name] = s3.output_error(W_hat, layer.W, layer.H)
    return [
        {"method": name, "error": errors[name], "time_s": median(times[name]), "mem_mib": median(memory[name])}
        | {"M": M, "K": K}
        for name in methods
    ]


def compare_unseen(count: int, damp: float) -> list[dict[str, Any]]:
    """Return the errors of both on layers of SmolLM2, of SparseKit's the lower of its two scorings."""
    rows: list[dict[str, Any]] = []
    for layer in tqdm(draw_unseen("cpu", count), total=count):
        for pattern in WIDE:
            theirs = [
                run_sparsekit_sobs(layer.W, layer.H, damp, pattern, scoring=name) for name in ("independent", "joint")
            ]
            ours = s3.prune(layer.W, pattern, layer.H, "sobs", damp=damp).weight
            row = {"layer": layer.name, "M": layer.W.shape[0], "K": layer.W.shape[1], "pattern": pattern}
            for split, H in (("error", layer.H), ("error_test", layer.H_test)):
                row |= {f"sparsekit_{split}": min(s3.output_error(W, layer.W, H) for W in theirs)}
                row |= {f"s3lab_{split}": s3.output_error(ours, layer.W, H)}
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=2, action="append", metavar=("M", "K"))
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--damp", type=float, default=1e-2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--unseen", type=int, metavar="LAYERS")
    args = parser.parse_args()

    facts = {
        "damp": args.damp,
        "repeats": args.repeats,
        **describe("cpu", "sparsekit"),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    if args.unseen:
        table = pd.DataFrame([row | facts for row in compare_unseen(args.unseen, args.damp)])
        write(RESULTS.with_name("compare_sobs_unseen.csv"), table.to_csv(index=False).encode())
        for split in ("error", "error_test"):
            ratio = table[f"s3lab_{split}"] / table[f"sparsekit_{split}"]
            print(
                f"{split}: s3lab / SparseKit, mean and largest\n{ratio.groupby(table['pattern']).agg(['mean', 'max'])}"
            )
        return
    for M, K in args.size or [(384, 1536), (96, 3072)]:
        rows = compare(M, K, args)
        known = [pd.read_csv(RESULTS)] if RESULTS.exists() else []
        table = pd.concat([*known, pd.DataFrame([row | facts for row in rows])])
        write(RESULTS, table.to_csv(index=False).encode())
        print(f"M = {M}, K = {K}")
        theirs = rows[0]
        for row in rows:
            ratios = (
                f"error × {row['error'] / theirs['error']:.4f}, {theirs['time_s'] / row['time_s']:.2f} times as fast, "
                f"memory × {row['mem_mib'] / theirs['mem_mib']:.3f}"
            )
            figures = f"error {row['error']:.5f}, {row['time_s']:6.2f} s, {row['mem_mib']:5.0f} MiB"
            print(f"{row['method']:>24}: {figures} | {ratios}", flush=True)


if __name__ == "__main__":
    main()
