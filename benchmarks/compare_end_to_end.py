"""Does a lower error of the layers give a lower perplexity?  The reference model pruned end to end, four patterns.

    python benchmarks/compare_end_to_end.py [--specs 2:4 8:16] [--sequences 240]

Prints a table and writes benchmarks/results/compare_end_to_end.csv, row by row as they come; what is there already is
not measured again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from facts import describe

import s3lab as s3
from s3lab.files import write
from s3lab.models.text import corpus
from s3lab.models.text.reference import load_reference, perplexity

RESULTS = Path(__file__).parent / "results" / "compare_end_to_end.csv"
SETTINGS = {
    "sparsegpt": {"solver": "sparsegpt"},
    "sobs": {"solver": "sobs"},
    "admm": {"solver": "admm"},
    "sparsegpt, damp auto": {"solver": "sparsegpt", "damp": "auto"},
    "admm, damp auto": {"solver": "admm", "damp": "auto"},
    "admm, damp auto, dense inputs": {"solver": "admm", "damp": "auto", "hessians": "dense"},
    "admm thorough, damp auto": {"solver": s3.ADMM(effort="thorough"), "damp": "auto"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", nargs="+", default=["2:4", "8:16", "2:4@1x2", "block16"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--sequences", type=int, default=240)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()

    model, tokenizer = load_reference()
    calibration = corpus.tokens(tokenizer, "calibration", 256, args.sequences, args.seed)
    test = corpus.tokens(tokenizer, "test", 256).to(args.device)
    dense = perplexity(model.to(args.device), test)
    facts = {
        "sequences": args.sequences,
        "seed": args.seed,
        **describe(args.device),
    }
    rows = pd.read_csv(args.out).to_dict("records") if args.out.exists() else []
    done = {(row["spec"], row["setting"]) for row in rows}
    for spec in args.specs:
        for name in args.settings:
            if (spec, name) in done:
                continue
            pruned = load_reference()[0].to(args.device)
            run = s3.prune_model(pruned, None, spec, calibration=calibration, progress=False, **SETTINGS[name])
            table = pd.DataFrame(run.matrices)
            rows.append(
                {
                    "spec": spec,
                    "setting": name,
                    "dense": dense,
                    "perplexity": perplexity(pruned, test),
                    "mean_error": table["error"].mean(),
                    "mean_error_test": table["error_test"].mean(),
                    "median_damp": table["damp"].median(),
                    "solver_s": table["time_s"].sum(),
                    **facts,
                }
            )
            print({k: v for k, v in rows[-1].items() if k not in facts}, flush=True)
            write(args.out, pd.DataFrame(rows).to_csv(index=False).encode())
    table = pd.DataFrame(rows)
    table["rise_percent"] = 100 * (table["perplexity"] / table["dense"] - 1)
    print(table.pivot_table("rise_percent", "setting", "spec", sort=False).round(2).to_string())


if __name__ == "__main__":
    main()
