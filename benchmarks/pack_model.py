"""A language model pruned by magnitude, packed, and loaded again by transformers: bytes, perplexity, tokens a second.

    python benchmarks/pack_model.py [--model smollm2] [--patterns 2:4 8:16] [--wraps 0 8] [--solver magnitude]

Writes benchmarks/results/packed_model.csv, a row for the dense model, and for each pattern, its core alone (0) and
between blocks of a size.  Pruned in float32, all is stored in bfloat16; bytes are those of the tensors of a file,
matrices of the decoder layers and embeddings apart, and of the file as a whole.  Each model is measured in a process of
its own: tokens a second, the median of those that it writes one after the other with a cache, in bfloat16, and
perplexity over 20 windows of 256 tokens of the built-in test text, in the dtype that the CPU is fast in; --tokens 0
leaves the former out, for a machine that is busy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from copy import deepcopy
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch

import s3lab as s3
from s3lab.files import write
from s3lab.lab.run.record import device_name
from s3lab.models.storage.checkpoint import save_pruned
from s3lab.models.storage.packed import pack_model
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model, to_fast_dtype
from s3lab.models.text.reference import perplexity
from s3lab.packing.file import find_files, read_tensors
from s3lab.packing.linear import PackedLinear
from s3lab.packing.weigh import weigh
from s3lab.tensors.meter import Meter

RESULTS = Path(__file__).parent / "results" / "packed_model.csv"
WINDOWS, LENGTH = 20, 256
PROMPT = 16  # tokens


@torch.inference_mode()
def measure(folder: Path, tokens: int, threads: int) -> dict[str, Any]:
    """Return what a model of a folder does, as transformers loads it."""
    torch.set_num_threads(threads)
    model, tokenizer = load_model(folder)
    test = corpus.tokens(tokenizer, "test", LENGTH, WINDOWS, 0)
    ids, cache, times = test[:1, :PROMPT], None, []
    for _ in range(tokens + 4 if tokens else 0):
        with Meter("cpu") as meter:
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        times.append(meter.time_s)
    packed = sum(isinstance(module, PackedLinear) for module in model.modules())
    to_fast_dtype(model)
    found = {"packed_layers": packed, "perplexity": perplexity(model, test)}
    return found | ({"tokens_per_s": 1 / median(times[4:])} if tokens else {})  # the first ones lay weights out


def measure_apart(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return what `measure` does, in a fresh process."""
    flags = ["--tokens", str(args.tokens), "--threads", str(args.threads)]
    command = [sys.executable, __file__, *flags, "--measure", str(folder)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def count_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of a dense model's file, and of its tensors: embeddings, and the matrices of its layers."""
    tensors, _ = read_tensors(find_files(folder))
    embeddings = {name: t for name, t in tensors.items() if "embed" in name or "lm_head" in name}
    matrices = {name: t for name, t in tensors.items() if t.ndim == 2 and name not in embeddings}
    return {
        "file_bytes": sum(path.stat().st_size for path in find_files(folder)),
        "embedding_bytes": sum(t.nbytes for t in embeddings.values()),
        "matrix_bytes": sum(t.nbytes for t in matrices.values()),
    }


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    dense, tokenizer = load_model(args.model, torch.float32)
    calibration = corpus.tokens(tokenizer, "calibration", LENGTH, args.sequences, 0)
    rows: list[dict[str, Any]] = []
    for pattern, block in [("1:1", 0), *product(args.patterns, args.wraps)]:
        model = deepcopy(dense)
        wrap = s3.Wrap(block=block) if block else None
        pruning = s3.prune_model(model, None, pattern, args.solver, wrap=wrap, calibration=calibration, progress=False)
        with TemporaryDirectory() as home:
            pruned, packed = Path(home) / "pruned", Path(home) / "packed"
            save_pruned(model.to(torch.bfloat16), tokenizer, pruned, pruning)
            before = measure_apart(pruned, args)
            sizes = count_bytes(pruned)
            told = {"pattern": "dense" if pattern == "1:1" else pattern, "wrap": block}
            row = {**told, **sizes, **before, "weight_bits": 16.0}
            if pattern != "1:1":
                left = pack_model(pruned, packed)
                after, lines = measure_apart(packed, args), [line for line in weigh(packed) if line.spec]
                weights = sum(line.dense for line in lines) / 2
                row |= {
                    "file_bytes": sum(path.stat().st_size for path in find_files(packed)),
                    "matrix_bytes": sum(line.bytes for line in lines),
                    "weight_bits": 8 * sum(line.bytes for line in lines) / weights,
                    "theory_bits": sum(line.theory * line.dense for line in lines if line.theory) / 2 / weights,
                    "left_dense": len(left),
                    **{f"unpacked_{key}": value for key, value in before.items() if key != "packed_layers"},
                    **after,
                }
            rows.append(row)
            print(row, flush=True)
    shared = {"model": args.model, "solver": args.solver, "threads": args.threads, "tokens": args.tokens}
    first = rows[0]
    return [
        {**shared, **row, "file_share": row["file_bytes"] / first["file_bytes"]}
        | {"matrix_share": row["matrix_bytes"] / first["matrix_bytes"], "device": device_name("cpu")}
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "8:16"])
    parser.add_argument("--wraps", nargs="+", type=int, default=[0])
    parser.add_argument("--solver", default="magnitude")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.tokens, args.threads)))
    else:
        write(args.out, pd.DataFrame(run(args)).to_csv(index=False).encode())


if __name__ == "__main__":
    main()
