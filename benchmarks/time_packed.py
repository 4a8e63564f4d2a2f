"""One token through packed weights, beside torch's dense product and its BSR, and how near to the machine's memory.

    python benchmarks/time_packed.py [--threads 2] [--repeats 20] [--patterns 2:4 8:16 "50% columns"]
    python benchmarks/time_packed.py --models pruned packed [--tokens 64]

The first writes benchmarks/results/time_packed.csv, a row for each shape, dtype and method: the median of the repeats
and the range that holds the middle 60 %, the bytes that a product must read, what that is a second, and the share of
what reading takes at best (a sum over 1 GiB, the roofline).  Methods take turns; each has several copies of its weight,
of `COLD` bytes together, so that none is read from a cache, as in a model of many layers.  The second prints how many
tokens a second a model of each folder writes, one after the other with a cache.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import linear

import s3lab as s3
from s3lab.algebra.partition import Partition
from s3lab.files import write
from s3lab.lab.run.record import device_name
from s3lab.models.text.pretrained import load_model
from s3lab.packing.codec import ALONE, Packed, bind, pack
from s3lab.packing.decode import find_product, tell
from s3lab.packing.hardware import find_tile, to_bsr
from s3lab.packing.rows import Rows

RESULTS = Path(__file__).parent / "results" / "time_packed.csv"
SHAPES = [(2560, 9728), (9728, 2560)]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COLD = 1 << 29
Call = Callable[[], object]


def clock(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measure_bandwidth(repeats: int) -> float:
    """Return how many bytes a second a sum reads, at best."""
    data = torch.ones(1 << 28)
    return data.nbytes / min(clock(data.sum) for _ in range(repeats))


def rotate(make: Callable[[], Any], size: int, use: Callable[[Any], object]) -> Call:
    """Return a call that uses one copy after the other, of which there are enough to fill no cache."""
    copies = cycle([make() for _ in range(max(1, COLD // size))])
    return lambda: use(next(copies))


def methods(W: Tensor, patterns: list[str], x: Tensor) -> dict[tuple[str, str], tuple[Call, int, str]]:
    """Return by pattern and method the call, the bytes that it must read, and how it is computed."""
    found: dict[tuple[str, str], tuple[Call, int, str]] = {
        ("dense", "torch"): (rotate(W.clone, W.nbytes, lambda own: linear(x, own)), W.nbytes, "linear")
    }
    for text in patterns:
        part = s3.parse(text).bind((W.shape[0], W.shape[1]))
        packed = pack(W.where(part.project(W.float().abs()), 0), text)
        rows = Rows.of(packed.places[ALONE], packed.values[ALONE])
        bits = 0 if rows.lines else (rows.bits if rows.runs is None else rows.runs).nbytes
        size = rows.values.bytes + bits + rows.starts.nbytes
        product = find_product(rows)
        assert product is not None
        call = rotate(lambda product=product: deepcopy(product), size, lambda own: own(x))
        found[text, "s3lab"] = call, size, tell(rows)
        if (bsr := make_bsr(packed, x)) is not None:
            size = bsr.values().nbytes + bsr.col_indices().nbytes + bsr.crow_indices().nbytes
            found[text, "torch BSR"] = rotate(bsr.clone, size, lambda own: own @ x.T), size, "sparse_bsr"
    return found


def make_bsr(packed: Packed, x: Tensor) -> Tensor | None:
    """Return the weight in BSR, where its blocks are tiles and torch multiplies by them."""
    part = bind(packed.pattern, packed.shapes)
    if not isinstance(part, Partition) or find_tile(part) in (None, (1, 1)):
        return None
    bsr = to_bsr(packed)
    try:
        _ = bsr @ x.T
    except RuntimeError as error:
        print(f"torch has no BSR product here: {str(error).splitlines()[0]}")
        return None
    return bsr


def run(args: argparse.Namespace) -> None:
    bandwidth = measure_bandwidth(args.repeats)
    rows: list[dict[str, Any]] = []
    for M, K in SHAPES:
        for name, dtype in DTYPES.items():
            generator = torch.Generator().manual_seed(0)
            W = torch.randn(M, K, generator=generator).to(dtype)
            x = torch.randn(1, K, generator=generator).to(dtype)
            found = methods(W, args.patterns, x)
            times: dict[tuple[str, str], list[float]] = {key: [] for key in found}
            for turn in range(args.repeats + 2):
                for key, (call, _, _) in found.items():
                    seconds = clock(call)
                    if turn >= 2:
                        times[key].append(seconds)
            dense = median(times["dense", "torch"])
            for (pattern, method), (_, size, path) in found.items():
                own = times[pattern, method]
                low, *_, high = quantiles(own, n=5)
                spread = {"time_ms": 1e3 * median(own), "low_ms": 1e3 * low, "high_ms": 1e3 * high}
                reach = {"bytes": size, "gb_s": size / median(own) / 1e9, "roofline": size / median(own) / bandwidth}
                row = {"M": M, "K": K, "dtype": name, "pattern": pattern, "method": method, "path": path}
                rows.append({**row, **spread, "faster": dense / median(own), **reach})
                print({key: round(value, 3) if isinstance(value, float) else value for key, value in rows[-1].items()})
    facts = {
        "threads": args.threads,
        "repeats": args.repeats,
        "memory_gb_s": bandwidth / 1e9,
        "device": device_name("cpu"),
    }
    table = pd.DataFrame([{**row, **facts} for row in rows])
    write(RESULTS, table.to_csv(index=False, float_format="%.6g").encode())


@torch.inference_mode()
def write_tokens(folder: str, tokens: int) -> float:
    """Return how many tokens a second a model writes after a prompt, the first ones aside."""
    model, tokenizer = load_model(folder)
    ids = tokenizer("The with statement wraps the execution of a block.", return_tensors="pt").input_ids
    cache, times = None, []
    for _ in range(tokens + 4):
        began = time.perf_counter()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        times.append(time.perf_counter() - began)
    return 1 / median(times[4:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--patterns", nargs="+", default=["2:4", "8:16", "block16", "50%@1x16", "50%@16x16", "50% columns"]
    )
    parser.add_argument("--models", nargs="+", metavar="FOLDER")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", UserWarning)  # that BSR is in beta
    if args.models:
        for folder in args.models:
            print(f"{folder}: {write_tokens(folder, args.tokens):.2f} tokens a second")
    else:
        run(args)


if __name__ == "__main__":
    main()
