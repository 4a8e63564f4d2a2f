"""N:M patterns, solvers and corrections on the reference model: perplexity and bits, over seeds of the calibration.

    python benchmarks/compare_nm_patterns.py --patterns 8:16 --seeds 0 1 2 3 4
    python benchmarks/compare_nm_patterns.py --summary

A run adds the rows that benchmarks/results/compare_nm_patterns.csv does not have yet, one by one, so that it can be
stopped at any time; ``--summary`` writes compare_nm_patterns_gain.csv, the change of each correction against none with
its 95 % confidence interval over the seeds (Student's t), and prints it.
"""

from __future__ import annotations

import argparse
import time
from math import sqrt
from pathlib import Path

import pandas as pd
from facts import describe

from s3lab.files import write
from s3lab.lab.study.corrections import CORRECTIONS, Comparison
from s3lab.models.correct.finetune import Schedule
from s3lab.models.text import corpus
from s3lab.models.text.reference import REFERENCE_DIR, load_reference

RESULTS = Path(__file__).parent / "results" / "compare_nm_patterns.csv"
KEYS = ["seed", "pattern", "solver", "correction"]
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # t of 97.5 %, by seeds


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the change of perplexity by each correction, per pattern and solver, with its interval over the seeds."""
    table = rows[rows["pattern"] != "dense"].pivot(index=KEYS[:3], columns="correction", values="perplexity")
    change = 100 * (table.drop(columns="none").div(table["none"], axis=0) - 1)
    change = change.melt(ignore_index=False).reset_index()
    found = change.dropna().groupby(["pattern", "solver", "correction"])["value"].agg(["count", "mean", "std"])
    found = found[found["count"] >= min(STUDENT)].reset_index()
    found["half_width"] = found["std"] / found["count"].map(sqrt) * found["count"].map(STUDENT)
    return found.rename(columns={"count": "seeds", "mean": "change_percent"}).drop(columns="std")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "8:16", "16:32", "50%/row"])
    parser.add_argument("--solvers", nargs="+", default=["ria", "wanda", "sparsegpt", "admm", "sobs"])
    parser.add_argument("--corrections", nargs="+", default=list(CORRECTIONS))
    parser.add_argument("--salient", default="16:256")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--small", type=Path, default=REFERENCE_DIR.parent / "small")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()

    rows = pd.read_csv(args.out).to_dict("records") if args.out.exists() else []
    if args.summary:
        gain = summarise(pd.DataFrame(rows))
        write(args.out.with_name(f"{args.out.stem}_gain.csv"), gain.to_csv(index=False).encode())
        print(gain.to_string(index=False))
        return
    done = {tuple(row[key] for key in KEYS) for row in rows}
    model, tokenizer = load_reference()
    test = corpus.tokens(tokenizer, "test", 256, args.windows, 0)
    facts = {
        "sequences": args.sequences,
        "windows": args.windows,
        "length": 256,
        "epochs": args.epochs,
        "lr": args.lr,
        **describe("cpu", "transformers"),
    }
    for seed in args.seeds:
        calibration = corpus.tokens(tokenizer, "calibration", 256, args.sequences, seed)
        schedule = Schedule(epochs=args.epochs, lr=args.lr)
        ground = Comparison(model, calibration, test, salient=args.salient, schedule=schedule, seed=seed)

        def add(row: dict[str, object], seed: int = seed) -> None:
            rows.append({"seed": seed, **row, **facts})
            write(args.out, pd.DataFrame(rows).to_csv(index=False).encode())

        for name, path in (("reference", REFERENCE_DIR), ("small", args.small)):
            if (seed, "dense", name, "none") not in done:
                add(ground.measure_dense(load_reference(path)[0], name))
        for pattern in args.patterns:
            for solver in args.solvers:
                for correction in args.corrections:
                    if (seed, pattern, solver, correction) not in done:
                        began = time.perf_counter()
                        add(ground.measure(pattern, solver, correction))
                        print(*(rows[-1][key] for key in [*KEYS, "bits", "perplexity"]), time.perf_counter() - began)


if __name__ == "__main__":
    main()
