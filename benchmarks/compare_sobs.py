"""S-OBS against SparseKit's, on one seeded layer in one process: error, time and memory, as ratios.

    pip install --no-deps sparsekit==0.1.5
    python benchmarks/compare_sobs.py [--K 1536] [--M 384] [--repeats 3]

Prints a table and appends to benchmarks/results/compare_sobs.csv.  SparseKit is under a non-commercial licence and is
no dependency of s3lab.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch.nn import Parameter

import s3lab as s3
from s3lab.lab.record import device_name
from s3lab.models.layers import generate_layer
from s3lab.tensors.meter import Meter

RESULTS = Path(__file__).parent / "results" / "compare_sobs.csv"


def run_sparsekit(W: torch.Tensor, H: torch.Tensor, damp: float) -> torch.Tensor:
    """Prune a copy of W in place with SparseKit's true OBS at the same damping, 16 rows at a time, its default."""
    from sparsekit import BlockSpec, ScopeSpec, StructuredOBS

    parameter = Parameter(W.clone())
    obs = StructuredOBS(ScopeSpec(BlockSpec(parameter, shape=(1, 1)), shape=(1, 4)), H, damp=damp)
    obs.prune_true_obs(nnz=2, ng=64, order="largest_first", c_dtype=torch.float32)
    return parameter.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--K", type=int, default=1536)
    parser.add_argument("--M", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--damp", type=float, default=1e-2)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    layer = generate_layer(args.M, args.K, args.tokens)
    ours = {"s3lab S-OBS, rows=16": s3.SOBS(rows=16), "s3lab S-OBS": s3.SOBS()}
    methods = {"sparsekit S-OBS, rows=16": lambda: run_sparsekit(layer.W, layer.H, args.damp)} | {
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

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = {
        "M": args.M,
        "K": args.K,
        "damp": args.damp,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "sparsekit": version("sparsekit"),
        "commit": commit,
    }
    rows = [
        {
            "method": name,
            "error": errors[name],
            "time_s": median(times[name]),
            "mem_mib": median(memory[name]),
            **facts,
        }
        for name in methods
    ]
    RESULTS.parent.mkdir(exist_ok=True)
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    theirs = rows[0]
    for row in rows:
        ratios = (
            f"error × {row['error'] / theirs['error']:.4f}, {theirs['time_s'] / row['time_s']:.2f} times as fast, "
            f"memory × {row['mem_mib'] / theirs['mem_mib']:.3f}"
        )
        figures = f"error {row['error']:.5f}, {row['time_s']:6.2f} s, {row['mem_mib']:5.0f} MiB"
        print(f"{row['method']:>24}: {figures} | {ratios}")


if __name__ == "__main__":
    main()
