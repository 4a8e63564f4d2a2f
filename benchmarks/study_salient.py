"""Which weights to take as salient: those that the main pattern would let go, or those of the highest score.

    python benchmarks/study_salient.py
    python benchmarks/study_salient.py --model smollm2

On four matrices of the reference model and three generated layers, every solver, errors on calibration and held-out
tokens: ``own`` with the salient blocks that a solver finds, ``highest`` with those of OBD's highest scores, as the
paper picks them.  Writes benchmarks/results/salient.csv, and how much lower the former are, salient_gain.csv.

With a model, its perplexity on the built-in text with and without salient weights, into salient_model.csv; rows that
are finished are kept in --folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pandas as pd
from facts import describe
from tqdm import tqdm

import s3lab as s3
from s3lab.files import write
from s3lab.lab.study.crossing import Crossing
from s3lab.models.measure.layers import Layer, generate_layer, layers_of_model
from s3lab.models.text import corpus
from s3lab.models.text.reference import load_reference

RESULTS = Path(__file__).parent / "results" / "salient.csv"
MAINS = ["2:4", "8:16", "2:4@1x2", "4:8@16x1 then 2:4"]
SALIENT = "16:256"
SOLVERS = ["wanda", "obd", "sparsegpt", "sobs", "admm"]
MODEL_PATTERNS = ["2:4", "2:4 plus 12:192", "8:16 plus 12:192"]  # a sixteenth; 576 inputs are no multiple of 256
NAMES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


def draw_layers() -> Iterator[Layer]:
    model, tokenizer = load_reference()
    ids = [corpus.tokens(tokenizer, split, 256, count, 0) for split, count in (("calibration", 100), ("test", 30))]
    yield from layers_of_model(model, *ids, [f"model.layers.3.{name}" for name in NAMES])
    for decay in (0.5, 1.0, 1.5):
        yield generate_layer(128, 512, 4096, decay=decay)


def study_layers() -> None:
    facts, rows = {"damp": 1e-2, "seed": 0, **describe()}, []
    for layer in tqdm(draw_layers(), total=len(NAMES) + 3):
        for pattern, solver in product(MAINS, SOLVERS):
            row = {"layer": layer.name, "pattern": f"{pattern} plus {SALIENT}", "solver": solver}
            for way, score in (("own", None), ("highest", "obd")):
                found = s3.prune(layer.W, row["pattern"], layer.H, solver, H_test=layer.H_test, salient=score)
                row |= {f"{way}_error": found.error, f"{way}_error_test": found.error_test}
            rows.append(row | facts)
        write(RESULTS, pd.DataFrame(rows).to_csv(index=False, float_format="%.6g").encode())
    table = pd.DataFrame(rows)
    for split in ("error", "error_test"):
        table[f"gain_{split}"] = 100 * (1 - table[f"own_{split}"] / table[f"highest_{split}"])
    gain = table.groupby(["pattern", "solver"])[["gain_error", "gain_error_test"]].agg(["mean", "min"])
    gain.columns = ["_".join(names) for names in gain.columns]
    write(RESULTS.with_name("salient_gain.csv"), gain.reset_index().to_csv(index=False, float_format="%.6g").encode())
    print(gain.round(1).to_string())


def study_model(model: str, folder: Path) -> None:
    facts, rows = {"damp": 1e-2, "seed": 0, **describe()}, []
    crossing = Crossing(model, {"documentation": ["stdlib", "stdlib"]}, folder, "float32")
    for pair in product(MODEL_PATTERNS, ("sparsegpt", "admm")):
        *_, row = crossing.rows([pair], ["documentation"], ["The capital of France is"], 16)
        rows.append({"model": model} | row | facts)
        write(RESULTS.with_name("salient_model.csv"), pd.DataFrame(rows).to_csv(index=False).encode())
        print(rows[-1], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a real one, in place of layers")
    parser.add_argument("--folder", type=Path, default=Path("salient-runs"), help="for finished rows of a model")
    args = parser.parse_args()
    if args.model:
        study_model(args.model, args.folder)
    else:
        study_layers()


if __name__ == "__main__":
    main()
