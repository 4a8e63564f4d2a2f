"""What a GPU does, in one command: its tests, every solver at the paper's size, kernels, and packed layers.

    python benchmarks/measure_gpu.py [--device cuda] [SLICE ...]
    python benchmarks/measure_gpu.py --device cpu --rehearse      # the same on a CPU, at sizes that mean nothing

tests     the tests of each file that need a GPU, as pytest counts them
paper     the size of the paper's Table 1: error, seconds and memory on a generated layer (2560, 9728), four patterns
kernels   the Triton kernels beside plain torch: seconds, and GB/s of what they read and write
packed    packed layers beside torch's dense product in the same dtype: seconds, and how each is computed

A slice is measured row by row, each in a process of its own that has --limit seconds, and each is written at once to
benchmarks/results/gpu_<slice>.csv, with the device's name: a run that was stopped goes on with what is missing.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import torch

import s3lab as s3
from s3lab.files import write
from s3lab.models.measure.layers import generate_layer
from s3lab.packing.codec import ALONE, pack
from s3lab.packing.file import Entry
from s3lab.packing.linear import PackedLinear
from s3lab.solvers.kernels import project, prune_tokens
from s3lab.tensors.activation import bind_token
from s3lab.tensors.meter import Meter

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PATTERNS = ["2:4", "2:4@1x2", "coupled-2:4", "block16"]
SOLVERS = ["magnitude", "wanda", "ria", "obd", "sparsegpt", "admm", "best", "sobs"]
KERNELS = ["project", "prune_tokens", "sparsegpt"]
PACKED = ["2:4", "8:16", "block16", "mma-m16n8k16"]
COLD = 1 << 29  # bytes of all copies of a weight, so that none is read from a cache
DAMP = 1e-2


def list_rows() -> dict[str, list[dict[str, Any]]]:
    """Return what names each row of each slice."""
    tested = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py") if "gpu" in path.read_text())
    return {
        "tests": [{"file": name} for name in tested],
        "paper": [{"pattern": pattern, "solver": solver} for pattern in PATTERNS for solver in SOLVERS],
        "kernels": [{"kernel": kernel, "impl": impl} for kernel in KERNELS for impl in ("torch", "triton")],
        "packed": [{"pattern": pattern, "tokens": tokens} for pattern in PACKED for tokens in (1, 8, 64)],
    }


def run_tests(file: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", file]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"outcome": (told.stdout or told.stderr).strip().splitlines()[-1]}


def prune_layer(pattern: str, solver: str, args: argparse.Namespace) -> dict[str, Any]:
    M, K, tokens = (64, 256, 2048) if args.rehearse else (2560, 9728, 65536)
    layer = generate_layer(M, K, tokens, device=args.device)
    small = generate_layer(64, 256, 1024, device=args.device)
    s3.prune(small.W, pattern, small.H, solver, damp=DAMP)  # what is compiled or set up at the first call
    meters: list[Meter] = []
    for _ in range(args.repeats):
        with Meter(args.device) as meter:
            found = s3.prune(layer.W, pattern, layer.H, solver, damp=DAMP)
        meters.append(meter)
    return {
        "M": M,
        "K": K,
        "tokens": tokens,
        "damp": DAMP,
        "error": found.error,
        "error_test": s3.output_error(found.weight, layer.W, layer.H_test),
        "time_s": median(meter.time_s for meter in meters),
        "mem_mib": median(meter.mem_mib or 0.0 for meter in meters),
        "repeats": args.repeats,
    }


def time_kernel(kernel: str, impl: Any, args: argparse.Namespace) -> dict[str, Any]:
    M, K = (64, 256) if args.rehearse else (8192, 8192)
    x, H = torch.randn(M, K, device=args.device), torch.eye(K, device=args.device)
    part, tokens = s3.parse("2:4").bind((M, K)), bind_token(s3.parse("2:4"), K)
    calls: dict[str, tuple[Callable[[], object], int]] = {  # and the bytes that each weight costs to read and write
        "project": (lambda: project(part, x, impl=impl), 5),
        "prune_tokens": (lambda: prune_tokens(x, tokens, impl=impl), 8),
        "sparsegpt": (lambda: s3.prune(x, "2:4", H, s3.SparseGPT(impl=impl)), 8),
    }
    call, size = calls[kernel]
    seconds = time_call(call, args)
    return {"M": M, "K": K, "time_s": seconds, "gb_s": size * M * K / seconds / 1e9, "repeats": args.repeats}


def time_call(call: Callable[[], object], args: argparse.Namespace) -> float:
    """Return the median seconds of a call, the first two aside."""
    times: list[float] = []
    for turn in range(args.repeats + 2):
        with Meter(args.device) as meter:
            call()
        if turn >= 2:
            times.append(meter.time_s)
    return median(times)


@torch.inference_mode()
def time_packed(pattern: str, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    M, K = (64, 256) if args.rehearse else (9728, 2560)
    dense = torch.randn(M, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    W = dense.where(s3.parse(pattern).bind((M, K)).project(dense.float().abs()), 0)
    layer = PackedLinear.of(Entry(pack(W, pattern), {ALONE: "up_proj"}), ALONE).to(args.device)
    x, dense = torch.randn(tokens, K, device=args.device).bfloat16(), dense.to(args.device)
    error = (layer(x).double() - x.double() @ W.to(args.device).double().T).norm() / x.norm()
    number = 1 if args.rehearse else max(1, COLD // dense.nbytes)
    layers, weights = (cycle([deepcopy(own) for _ in range(number)]) for own in (layer, dense))
    seconds = [
        time_call(call, args)
        for call in (lambda: next(layers)(x), lambda: torch.nn.functional.linear(x, next(weights)))
    ]
    return {
        "M": M,
        "K": K,
        "dtype": "bfloat16",
        "path": layer.path,
        "time_s": seconds[0],
        "dense_s": seconds[1],
        "faster": seconds[1] / seconds[0],
        "error": float(error),
        "repeats": args.repeats,
    }


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "tests": run_tests,
    "paper": prune_layer,
    "kernels": time_kernel,
    "packed": time_packed,
}


def measure_apart(name: str, row: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measure one row in a process of its own; what goes wrong there is told in the column ``problem``."""
    flags = ["--device", args.device, "--repeats", str(args.repeats), *(["--rehearse"] if args.rehearse else [])]
    command = [sys.executable, __file__, *flags, "--row", name, json.dumps(row)]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"problem": f"more than {args.limit} s"}
    if told.returncode:
        return {"problem": (told.stderr.strip().splitlines() or ["no word"])[-1]}
    return json.loads(told.stdout.strip().splitlines()[-1])


def run_slice(name: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Measure the rows of a slice that are not in its CSV for this device and commit."""
    path = args.out / f"gpu_{name}.csv"
    kept = list(csv.DictReader(io.StringIO(path.read_text()))) if path.exists() else []
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    device = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device
    facts = {"device": device, "torch": torch.__version__, "rehearsal": args.rehearse}
    facts["commit"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    for row in rows:
        known = {key: str(value) for key, value in (row | facts).items()}
        if not any(known.items() <= old.items() and not old.get("problem") for old in kept):
            found = row | measure_apart(name, row, args) | facts
            print(found, flush=True)
            kept.append({key: str(value) for key, value in found.items()})
            text = io.StringIO()
            writer = csv.DictWriter(
                text, list(dict.fromkeys(key for line in kept for key in line)), lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(kept)
            write(path, text.getvalue().encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slices", nargs="*", metavar="SLICE", help=f"{', '.join(MEASURES)}; all if none is named")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="at sizes that are for trying this file out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--limit", type=float, default=450, help="seconds that a row may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--row", nargs=2, metavar=("SLICE", "JSON"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        name, row = args.row
        print(json.dumps(MEASURES[name](**json.loads(row), args=args)))
        return
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --device cpu --rehearse tries the rest out")
    if unknown := sorted({*args.slices} - {*MEASURES}):
        parser.error(f"no slice is called {', '.join(unknown)}: there are {', '.join(MEASURES)}")
    for name, rows in list_rows().items():
        if not args.slices or name in args.slices:
            run_slice(name, rows, args)


if __name__ == "__main__":
    main()
