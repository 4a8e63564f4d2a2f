"""What another basis brings at 2:4: SparseGPT's perplexity permuted and rotated before, over seeds of the calibration.

    python benchmarks/study_permute.py --seeds 0 1 2 3 4
    python benchmarks/study_permute.py --model smollm2

A run adds the rows that benchmarks/results/permute.csv does not have yet, one by one, so that it can be stopped at any
time.  ``dense`` is the perplexity in the other basis before anything is pruned: what rounding to the dtype costs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from facts import find_commit

import s3lab as s3
from s3lab.files import write
from s3lab.lab.run.record import device_name
from s3lab.models.basis.prepare import permute_and_tell, rotate_and_tell
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.reference import perplexity

RESULTS = Path(__file__).parent / "results" / "permute.csv"
SPEC, SOLVER = "2:4", "sparsegpt"
# By name, the kind of rotation and the score to permute by.
CHANGES = {
    "none": (None, None),
    "permute magnitude": (None, "magnitude"),
    "permute wanda": (None, "wanda"),
    "permute saliency": (None, "saliency"),
    "rotate hadamard": ("hadamard", None),
    "rotate learned": ("learned", None),
    "rotate learned, permute wanda": ("learned", "wanda"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--changes", nargs="+", choices=tuple(CHANGES), default=list(CHANGES))
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()

    rows: list[dict[str, Any]] = pd.read_csv(RESULTS).to_dict("records") if RESULTS.exists() else []
    done = {(row["model"], row["seed"], row["change"]) for row in rows}
    commit = find_commit()
    for seed in args.seeds:
        text = {"calibration": "stdlib", "sequences": args.sequences, "length": args.length, "seed": seed}
        for change in args.changes:
            if (args.model, seed, change) in done:
                continue
            model, tokenizer = load_model(args.model, args.dtype)
            test = corpus.tokens(tokenizer, "test", args.length, args.windows, 0)
            drawn = {**text, "held_out": 0.1, "batch": 8}
            rotation, score = CHANGES[change]
            told = rotate_and_tell(model, tokenizer, rotation, **drawn) if rotation else ""
            told += permute_and_tell(model, tokenizer, SPEC, score, **drawn) if score else ""
            dense = perplexity(model, test)
            run = s3.prune_model(model, tokenizer, SPEC, SOLVER, **drawn, progress=False)
            errors = [row["error"] for row in run.matrices]
            facts = {"windows": args.windows, "dtype": args.dtype, "commit": commit, "device": device_name("cpu")}
            found = {"dense": dense, "perplexity": perplexity(model, test), "error": sum(errors) / len(errors)}
            named = {"model": args.model, "seed": seed, "change": change}
            rows.append({**named, **found, "told": told, "spec": SPEC, "solver": SOLVER, **text, **facts})
            write(RESULTS, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g").encode())
            print(args.model, seed, change, *(f"{rows[-1][key]:.6g}" for key in ("dense", "perplexity", "error")))


if __name__ == "__main__":
    main()
