"""How many columns S-OBS may visit together: errors by the width of its batches, on layers of the reference model.

    python benchmarks/study_sobs.py

Writes results/sobs_batch.csv: four matrices, seven patterns, batches of 64 columns down to one scope at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

import s3lab as s3
from s3lab.files import write
from s3lab.models.measure.layers import layers_of_model
from s3lab.models.text import corpus
from s3lab.models.text.reference import load_reference
from s3lab.tensors.meter import Meter

RESULTS = Path(__file__).parent / "results" / "sobs_batch.csv"
BATCHES = [64, 32, 16, 8, 4, 1]
PATTERNS = ["2:4", "8:16", "50%/row", "2:4@1x2", "1:2@2x4", "coupled-2:4", "block16"]
MATRICES = [f"model.layers.{name}" for name in ("2.self_attn.o_proj", "2.mlp.up_proj", "4.self_attn.q_proj")]
MATRICES += ["model.layers.3.mlp.down_proj"]
SEQUENCES, LENGTH = 60, 256


def main() -> None:
    model, tokenizer = load_reference()
    calibration = corpus.tokens(tokenizer, "calibration", LENGTH, SEQUENCES, 0)
    test = corpus.tokens(tokenizer, "test", LENGTH, SEQUENCES // 4, 0)
    rows: list[dict[str, Any]] = []
    for layer in layers_of_model(model, calibration, test, MATRICES):
        for pattern in PATTERNS:
            for batch in BATCHES:
                with Meter("cpu") as meter:
                    found = s3.prune(layer.W, pattern, layer.H, s3.SOBS(batch=batch))
                held_out = s3.output_error(found.weight, layer.W, layer.H_test)
                row = {"layer": layer.name, "pattern": pattern, "batch": batch, "time_s": round(meter.time_s, 3)}
                rows.append(row | {"error": found.error, "error_test": held_out})
    table = pd.DataFrame(rows)
    write(RESULTS, table.to_csv(index=False, float_format="%.6g").encode())
    for column in ("error", "error_test", "time_s"):
        wide = table.pivot_table(column, ["layer", "pattern"], "batch")
        print(f"{column}, as a multiple of that with a batch of 32:")
        print(wide.div(wide[32], axis=0).groupby("pattern", sort=False).mean().round(3).to_string())


if __name__ == "__main__":
    main()
