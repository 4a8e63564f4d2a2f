"""A training step of one linear layer under a pattern, beside the same step of the dense layer.

    python benchmarks/time_training_step.py [--threads 2] [--repeats 15] [--patterns 2:4] [--methods srste fixed …]

Forward, backward and the step of AdamW, in float32.  Writes benchmarks/results/time_training_step.csv, a row for each
pattern and method: the median of the repeats, the range that holds the middle 60 %, and the ratio to the dense layer's
median.  All take turns in one process, so that what else the machine does meets each of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pandas as pd
import torch
from torch import nn

import s3lab as s3
from s3lab.files import write
from s3lab.lab.run.record import device_name

RESULTS = Path(__file__).parent / "results" / "time_training_step.csv"
METHODS: dict[str, Any] = {
    "fixed": s3.Fixed(),
    "ste": s3.STE(),
    "srste": s3.SRSTE(),
    "gradual": s3.Gradual(steps=10_000, every=100),
    "rigl": s3.RigL(steps=10_000, every=100),
    "proximal": s3.Proximal(),
    "spp": s3.SPP(),
    "lora": s3.LoRA(),
    "s2ft": s3.S2FT(),
}


def make_step(layer: nn.Linear, X: torch.Tensor, method: Any = None, pattern: str = "") -> Callable[[], object]:
    """Return a call that takes a step of a layer, under a pattern if a method is given."""
    sparsity = s3.sparse(layer, pattern, method) if method else None
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-4, fused=True)
    if sparsity:
        sparsity.follow(optimizer)

    def step() -> None:
        optimizer.zero_grad()
        layer(X).square().mean().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--patterns", nargs="+", default=["2:4"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    M, K, tokens = 1024, 2048, 2048
    torch.manual_seed(0)
    X = torch.randn(tokens, K, requires_grad=True)  # as within a network, whose layers below want a gradient
    calls = {("dense", "dense"): make_step(nn.Linear(K, M), X)}
    for pattern in args.patterns:
        calls |= {(pattern, name): make_step(nn.Linear(K, M), X, METHODS[name], pattern) for name in args.methods}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for turn in range(args.repeats + 2):
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            if turn >= 2:
                times[key].append(time.perf_counter() - began)
    dense = median(times["dense", "dense"])
    rows = []
    for (pattern, name), own in times.items():
        low, *_, high = quantiles(own, n=5)
        figures = {
            "time_ms": 1e3 * median(own),
            "low_ms": 1e3 * low,
            "high_ms": 1e3 * high,
            "ratio": median(own) / dense,
        }
        rows.append({"M": M, "K": K, "tokens": tokens, "pattern": pattern, "method": name, **figures})
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()})
    facts = {"threads": args.threads, "repeats": args.repeats, "device": device_name("cpu")}
    write(RESULTS, pd.DataFrame([{**row, **facts} for row in rows]).to_csv(index=False, float_format="%.6g").encode())


if __name__ == "__main__":
    main()
