"""What surrounds a mask on a real model: perplexity with and without one ingredient, by the same solver.

    python benchmarks/study_stack.py --model smollm2 --solver admm --pattern 2:4 --ingredient wrap
    python benchmarks/study_stack.py --model smollm2 --solver sparsegpt --pattern 8:16 --ingredient budget

The built-in text calibrates, in 128 sequences of 512 tokens, and another part of it measures, in 40 of them; all is in
float32.  Adds rows to benchmarks/results/stack.csv, or puts them in place of earlier ones of the same settings; what is
finished is kept in --folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from facts import describe

from s3lab.files import write
from s3lab.lab.study.stack import DENSE, INGREDIENTS, PLAIN, Stacking
from s3lab.models.search.methods import METHODS

RESULTS = Path(__file__).parent / "results" / "stack.csv"
KEYS = ["model", "solver", "pattern", "stack", "budgets", "seed", "block"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--solver", default="admm")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--family", default="{n in 4..12}:16", help="what a budget chooses from")
    parser.add_argument("--ingredient", choices=INGREDIENTS, default="wrap")
    parser.add_argument("--method", choices=tuple(METHODS), default="loss", help="of a budget")
    parser.add_argument("--block", type=int, default=8, help="of wraps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("stack-runs"), help="for finished rows")
    args = parser.parse_args()
    stacking = Stacking(
        args.model,
        {"documentation": ["stdlib", "stdlib"]},
        args.folder,
        "float32",
        args.solver,
        method=args.method,
        block=args.block,
    )
    shared = {"model": args.model, "solver": args.solver, "block": args.block}
    facts = {"damp": stacking.damp, "sequences": stacking.sequences, "length": stacking.length, **describe()}
    dense = next(iter(stacking.rivals(())))
    add({**shared, "pattern": DENSE, "budgets": "", "seed": 0, **dense, **facts})
    for row in stacking.rows({args.pattern: args.family}, {PLAIN: (), args.ingredient: (args.ingredient,)}, args.seeds):
        add({**shared, "budgets": args.method if row["stack"] == "budget" else "", **row, **facts})


def add(row: dict[str, object]) -> None:
    """Put a row into the table, in place of one of the same settings."""
    table = pd.DataFrame([row])
    if RESULTS.exists():
        table = pd.concat([pd.read_csv(RESULTS).fillna({"budgets": ""}), table]).drop_duplicates(KEYS, keep="last")
    write(RESULTS, table.to_csv(index=False, float_format="%.6g").encode())
    shown = [*KEYS, "bits", "error_test_percent", "documentation_perplexity"]
    print({key: row[key] for key in shown if key in row}, flush=True)


if __name__ == "__main__":
    main()
