"""Where the time of `s3lab prune` goes, beside the two passes of the layers over the calibration text that it needs.

    python benchmarks/time_pruning.py [--model smollm2] [--layers 8] [--solvers sparsegpt admm] [--repeats 3]

Each solver runs in a process of its own, which first takes the passes, of as many of the model's first layers.  Writes
benchmarks/results/time_pruning.csv: seconds in all, of the two passes, of second moments, of the solvers with their
factorisations and errors, of writing, of the rest, which is the passes made; and the peak of memory beside the sizes of
the model's file and of a process that has loaded it.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd
import torch

from s3lab.files import write
from s3lab.lab.run.record import commit, device_name
from s3lab.models.prune import layerwise
from s3lab.models.prune.rundir import RunDir
from s3lab.models.prune.sequential import prune_model
from s3lab.models.structure.decoder import find_decoder
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model
from s3lab.tensors.hessian import Moment

RESULTS = Path(__file__).parent / "results" / "time_pruning.csv"


def measure(model: str, dtype: str, layers: int, sequences: int, length: int, solver: str) -> dict[str, Any]:
    """Prune the first layers of a model at 2:4, and return the row."""
    lm, tokenizer = load_model(model, dtype)
    decoder = find_decoder(lm)
    whole = lm.get_submodule(decoder.name)
    layers = min(layers, len(whole))
    rest = [p.numel() * p.element_size() for layer in whole[layers:] for p in layer.parameters()]
    file_mib = (sum(p.numel() * p.element_size() for p in lm.parameters()) - sum(rest)) / 2**20
    setattr(lm.get_submodule(decoder.name.rpartition(".")[0]), decoder.name.rpartition(".")[2], whole[:layers])
    lm.config.num_hidden_layers = layers
    ids = corpus.tokens(tokenizer, "calibration", length, sequences, 0)
    loaded_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    body, passes = lm.get_submodule(decoder.name.partition(".")[0]), []
    with torch.inference_mode():
        for _ in range(2):
            began = time.perf_counter()
            for part in ids.split(8):
                body(input_ids=part, use_cache=False)
            passes.append(time.perf_counter() - began)

    spent: dict[str, float] = defaultdict(float)

    def clock(owner: Any, name: str, what: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[what] += time.perf_counter() - began

        setattr(owner, name, timed)

    clock(Moment, "add", "moments_s")
    clock(Moment, "value", "moments_s")
    clock(layerwise, "prune", "solve_s")
    clock(RunDir, "save", "write_s")
    with TemporaryDirectory() as out:
        began = time.perf_counter()
        run = prune_model(lm, tokenizer, "2:4", solver, calibration=ids, out=out, progress=False)
        total = time.perf_counter() - began
    return {
        "model": model,
        "dtype": dtype,
        "layers": layers,
        "tokens": ids.numel(),
        "solver": solver,
        "total_s": total,
        "two_passes_s": sum(passes),
        "ratio": total / sum(passes),
        **spent,
        "passes_made_s": total - sum(spent.values()),
        "error_percent": 100 * sum(row["error"] for row in run.matrices) / len(run.matrices),
        "file_mib": file_mib,
        "loaded_mib": loaded_mib,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--solvers", nargs="+", default=["sparsegpt", "admm"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        told = measure(args.model, args.dtypes[0], args.layers, args.sequences, args.length, args.solvers[0])
        return print(json.dumps(told))
    rows = []
    for repeat in range(args.repeats):
        for dtype in args.dtypes:
            for solver in args.solvers:
                sizes = ["--layers", args.layers, "--sequences", args.sequences, "--length", args.length]
                which = ["--model", args.model, "--dtypes", dtype, "--solvers", solver]
                command = [sys.executable, __file__, "--one", *map(str, [*which, *sizes])]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                facts = {"device": device_name("cpu"), "torch": torch.__version__, "commit": commit()["commit"]}
                rows.append(json.loads(done.stdout.splitlines()[-1]) | {"repeat": repeat, **facts})
                write(args.out, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n").encode())
                print({key: round(value, 2) if isinstance(value, float) else value for key, value in rows[-1].items()})


if __name__ == "__main__":
    main()
