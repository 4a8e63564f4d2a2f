"""Inputs of a model pruned at 50 %: every pattern, criterion and correction over seeds, beside weights.

    python benchmarks/compare_activations.py [--seeds 0 1 2 3 4] [--windows 8] [--sequences 4]
    python benchmarks/compare_activations.py --model smollm2 --seeds 0 --criteria act --corrections none --solvers \\
        --windows 40 --length 512 --out benchmarks/results/compare_activations_smollm2.csv

A seed draws the calibration text, the windows that perplexity is measured on, and what learning sees.  Writes
benchmarks/results/compare_activations.csv, or another file, a row for each combination and seed, as it goes, and goes
on from there; and beside it, in a file of that name and _gains, each correction's gain with its 95 % interval over the
seeds, where it has several.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
from facts import describe

import s3lab as s3
from s3lab.files import write
from s3lab.lab.study.inputs import compare_inputs, find_gains
from s3lab.models.inputs.calibrate import Learning
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.reference import perplexity

RESULTS = Path(__file__).parent / "results" / "compare_activations.csv"
PATTERNS = ["2:4", "4:8", "8:16", "16:32", "50%/row"]
CORRECTIONS = {
    "none": {},
    "D-PTS median": {"shift": "median"},
    "D-PTS mean": {"shift": "mean"},
    "S-PTS": {"shift": "channel"},
    "L-PTS": {"shift": "learned"},
    "VAR": {"variance": True},
    "LS": {"scale": True},
    "R-Sparse": {"rank": 8},
    "D-PTS + VAR": {"shift": "median", "variance": True},
}


def measure(args: argparse.Namespace, seed: int, pattern: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a pattern and a seed: inputs pruned in every way, then weights by each solver."""
    model, tokenizer = load_model(args.model, "float32")
    calibration = corpus.tokens(tokenizer, "calibration", args.length, args.sequences, seed)
    test = corpus.tokens(tokenizer, "test", args.length, args.windows, seed)
    learning = Learning(args.steps, args.lr, args.tokens, at_once=64, seed=seed)
    corrections = {name: CORRECTIONS[name] for name in args.corrections}
    for row in compare_inputs(model, calibration, test, [pattern], args.criteria, corrections, learning):
        yield {"pruned": "inputs", **row}
    dense = row["dense_perplexity"]
    for solver in args.solvers:
        pruned = deepcopy(model)
        s3.prune_model(pruned, None, pattern, solver, calibration=calibration, seed=seed, progress=False)
        found = perplexity(pruned, test)
        loss = {"perplexity": found, "dense_perplexity": dense, "loss_percent": 100 * (found / dense - 1)}
        yield {"pruned": "weights", "pattern": pattern, "criterion": solver, "correction": "none", **loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--criteria", nargs="+", default=["act", "clact", "amber"])
    parser.add_argument("--corrections", nargs="+", choices=tuple(CORRECTIONS), default=list(CORRECTIONS))
    parser.add_argument("--solvers", nargs="*", default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window and of a sequence")
    parser.add_argument("--steps", type=int, default=10, help="of learning")
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--tokens", type=int, default=128, help="in a step of learning")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    facts = {
        **{key: getattr(args, key) for key in ("model", "windows", "sequences", "steps", "lr", "tokens", "length")},
        **describe("cpu", "transformers"),
    }
    rows = pd.read_csv(args.out).to_dict("records") if args.out.exists() else []
    done = {(row["seed"], row["pattern"]) for row in rows}
    for seed in args.seeds:
        for pattern in PATTERNS:
            if (seed, pattern) not in done:
                began = time.perf_counter()
                found = [{"seed": seed, **row} for row in measure(args, seed, pattern)]
                facts["time_s"] = round(time.perf_counter() - began, 1)
                rows += [{**row, **facts} for row in found]
                write(args.out, pd.DataFrame(rows).to_csv(index=False).encode())
    table = pd.DataFrame(rows)
    by = ["pattern", "criterion", "correction"]
    corrected = table[(table["pruned"] == "inputs") & (table["correction"] != "none")]
    several = corrected.groupby(by).filter(lambda group: len(group) > 1)
    if len(several):
        gains = find_gains(several, by).to_csv(index=False)
        write(args.out.with_name(f"{args.out.stem}_gains.csv"), gains.encode())
    print(table.groupby(["pruned", "criterion", "correction", "pattern"], sort=False)["loss_percent"].mean().unstack())


if __name__ == "__main__":
    main()
