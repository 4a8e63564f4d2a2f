"""Hidden units taken out of the reference model: perplexity masked and shrunk, time, parameters and bytes.

    python benchmarks/shrink_model.py [--keep 75%] [--solvers magnitude sobs admm] [--repeats 15]

A quarter of the MLP channels and one kv-group go from each layer; what feeds them follows.  Prints a table and writes
benchmarks/results/shrink_model.csv.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from facts import describe
from transformers import PreTrainedModel

import s3lab as s3
from s3lab.files import write
from s3lab.models.prune.shrink import shrink
from s3lab.models.storage.checkpoint import save_pruned
from s3lab.models.text import corpus
from s3lab.models.text.reference import load_reference, perplexity

RESULTS = Path(__file__).parent / "results" / "shrink_model.csv"


def time_forward(models: dict[str, PreTrainedModel], ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """Return the median seconds of a forward pass of each model, in turn, so that a busy machine weighs on all."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(input_ids=ids, use_cache=False)
        for _ in range(repeats):
            for name, model in models.items():
                began = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                times[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in times.items()}


def shrink_reference(
    solver: str, specs: list[str], calibration: torch.Tensor, test: torch.Tensor, repeats: int
) -> dict[str, object]:
    """Prune the reference model, shrink it, and return the row of the table."""
    masked, tokenizer = load_reference()
    dense_bytes = _bytes(masked)
    run = s3.prune_model(masked, None, specs, solver, calibration=calibration, progress=False)
    smaller = deepcopy(masked)
    shrunk = shrink(smaller)
    logits = _logits(masked, test[:4])
    apart = (_logits(smaller, test[:4]) - logits).abs().max() / logits.abs().max()
    times = time_forward({"masked": masked, "shrunk": smaller}, test[:8], repeats)
    with tempfile.TemporaryDirectory() as folder:
        save_pruned(smaller, tokenizer, folder, run, shrunk)
        again = _logits(load_reference(folder)[0], test[:4])
        file_bytes = (Path(folder) / "model.safetensors").stat().st_size
    return {
        "solver": solver,
        "masked_perplexity": perplexity(masked, test),
        "shrunk_perplexity": perplexity(smaller, test),
        "relative_logit_difference": float(apart),
        "reloaded_equal": torch.equal(again, _logits(smaller, test[:4])),
        "masked_forward_s": times["masked"],
        "shrunk_forward_s": times["shrunk"],
        "masked_parameters": shrunk.parameters[0],
        "shrunk_parameters": shrunk.parameters[1],
        "masked_mib": dense_bytes / 2**20,
        "shrunk_mib": file_bytes / 2**20,
        "sizes": "; ".join(f"{key} {before} to {after}" for key, (before, after) in shrunk.sizes.items()),
        "solver_s": sum(row["time_s"] for row in run.matrices),
    }


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits


def _bytes(model: PreTrainedModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return (Path(folder) / "model.safetensors").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", default="75%", help="of the MLP channels")
    parser.add_argument("--solvers", nargs="+", default=["magnitude", "sobs", "admm"])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    model, tokenizer = load_reference()
    calibration = corpus.tokens(tokenizer, "calibration", 256, args.sequences, args.seed)
    test = corpus.tokens(tokenizer, "test", 256, args.windows, args.seed)
    specs = [f"mlp-channels keep {args.keep}", f"kv-groups keep {model.config.num_key_value_heads - 1}"]
    facts = {
        "dense_perplexity": perplexity(model, test),
        "spec": "; ".join(specs),
        "sequences": args.sequences,
        "windows": args.windows,
        "length": 256,
        "repeats": args.repeats,
        "seed": args.seed,
        **describe("cpu", "transformers"),
    }
    rows = []
    for solver in args.solvers:
        rows.append({**shrink_reference(solver, specs, calibration, test, args.repeats), **facts})
        write(args.out, pd.DataFrame(rows).to_csv(index=False).encode())
    print(pd.DataFrame(rows).set_index("solver").T.to_string())


if __name__ == "__main__":
    main()
