"""What a Hessian weighted by the loss brings over that of the inputs alone: perplexity, by pattern, solver and seed.

    python benchmarks/study_loss_hessian.py --seeds 0 1 2
    python benchmarks/study_loss_hessian.py --model smollm2 --patterns 2:4 --solvers sparsegpt --sequences 32 \
        --length 512 --windows 20
    python benchmarks/study_loss_hessian.py --summary

Adds the rows that results/loss_hessian.csv does not have yet, one by one, so that it can be stopped at any time: the
held-out perplexity of each pruned model, and, of its matrices, the mean errors in per cent on held-out tokens in either
metric, that of the inputs and that of the loss.  All prune by second moments of the dense model's inputs; the seed is
that of the calibration text.  ``--summary`` writes loss_hessian_gain.csv: means over the seeds, and the change that
the loss brings, in per cent, with its least and most of a seed.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from itertools import product
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from facts import describe

import s3lab as s3
from s3lab.files import write
from s3lab.models.prune.moments import read_moments
from s3lab.models.structure.decoder import find_decoder
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.reference import perplexity

RESULTS = Path(__file__).parent / "results" / "loss_hessian.csv"
KEYS = ["model", "seed", "pattern", "solver", "hessian"]
METRICS = ("inputs", "loss")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: matrix.weight for found in find_decoder(model).matrices for name, matrix in found.items()}


def measure_errors(dense: torch.nn.Module, pruned: torch.nn.Module, moments: Path) -> float:
    """Return the mean relative error of the matrices, in per cent, on the held-out second moments of a folder."""
    before, after, errors = weights(dense), weights(pruned), []
    for file in sorted(moments.glob("*.safetensors")):
        for names, found in read_moments(file).items():
            assert found.H_test is not None
            errors += [s3.output_error(after[name], before[name], found.H_test, found.outputs) for name in names]
    return 100 * mean(errors)


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the mean perplexity and errors by either Hessian, and the change of the perplexity, over the seeds."""
    keys = [key for key in KEYS if key not in ("seed", "hessian")]
    table = rows[rows["pattern"] != "dense"].pivot(index=[*keys, "seed"], columns="hessian")
    perplexities = table["perplexity"]
    change = 100 * (perplexities["loss"] / perplexities["inputs"] - 1)
    found = perplexities.groupby(keys, sort=False).mean()[[*METRICS]]
    found["change_percent"] = change.groupby(keys).mean()
    found["least_percent"], found["most_percent"] = change.groupby(keys).min(), change.groupby(keys).max()
    for metric in METRICS:
        errors = table[f"error_{metric}_percent"]
        change = 100 * (errors["loss"] / errors["inputs"] - 1)
        found[f"error_{metric}_change_percent"] = change.groupby(keys).mean()
    found["seeds"] = change.groupby(keys).count()
    return found.reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "50%", "block16", "coupled-2:4"])
    parser.add_argument("--solvers", nargs="+", default=["sparsegpt", "admm"])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()

    rows = pd.read_csv(args.out).to_dict("records") if args.out.exists() else []
    if args.summary:
        gain = summarise(pd.DataFrame(rows))
        write(args.out.with_name(f"{args.out.stem}_gain.csv"), gain.to_csv(index=False, float_format="%.6g").encode())
        print(gain.round(2).to_string(index=False))
        return
    done = {tuple(row[key] for key in KEYS) for row in rows}
    dense, tokenizer = load_model(args.model)
    test = corpus.tokens(tokenizer, "test", args.length, args.windows, 0)
    facts = {
        "sequences": args.sequences,
        "length": args.length,
        "windows": args.windows,
        **describe("cpu", "transformers"),
    }

    def add(row: dict[str, object]) -> None:
        rows.append({"model": args.model, **row, **facts})
        write(args.out, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g").encode())
        print(*(rows[-1].get(key) for key in [*KEYS, "perplexity"]), flush=True)

    for seed in args.seeds:
        ids = corpus.tokens(tokenizer, "calibration", args.length, args.sequences, seed)
        if (args.model, seed, "dense", "none", "none") not in done:
            told = {"seed": seed, "pattern": "dense", "solver": "none", "hessian": "none"}
            add({**told, "perplexity": perplexity(dense, test)})
        runs = [run for run in product(args.patterns, args.solvers, METRICS) if (args.model, seed, *run) not in done]
        with TemporaryDirectory() as folder:
            moments = {metric: Path(folder) / metric for metric in METRICS}
            common = {"calibration": ids, "seed": seed, "hessians": "dense", "progress": False}
            if runs:  # both metrics are measured by, whichever a run prunes by
                for metric in METRICS:
                    s3.prune_model(
                        deepcopy(dense), None, "2:4", "magnitude", hessian=metric, moments=moments[metric], **common
                    )
            for pattern, solver, hessian in runs:
                model = deepcopy(dense)
                s3.prune_model(model, None, pattern, solver, hessian=hessian, moments=moments[hessian], **common)
                told = {"seed": seed, "pattern": pattern, "solver": solver, "hessian": hessian}
                told |= {"perplexity": perplexity(model, test)}
                add(told | {f"error_{m}_percent": measure_errors(dense, model, moments[m]) for m in METRICS})


if __name__ == "__main__":
    main()
