"""What block-diagonal matrices around a sparse core bring, on generated layers, by the size of their blocks.

    python benchmarks/study_wrap.py

Writes results/wrap.csv: errors at 2:4 of ADMM alone and wrapped, on calibration and held-out tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

import s3lab as s3
from s3lab.files import write
from s3lab.models.measure.layers import generate_layer

RESULTS = Path(__file__).parent / "results" / "wrap.csv"
SHAPE, TOKENS, DECAYS, BLOCKS = (384, 576), 4096, (0.5, 1.0), (8, 16, 32)


def main() -> None:
    rows: list[dict[str, Any]] = []
    for decay in DECAYS:
        layer = generate_layer(*SHAPE, TOKENS, decay=decay, seed=3)
        alone = s3.prune(layer.W, "2:4", layer.H, "admm", H_test=layer.H_test)
        found = {0: (alone.error, alone.error_test, 0.0)}
        for block in BLOCKS:
            wrapped = s3.wrap(layer.W, "2:4", layer.H, "admm", H_test=layer.H_test, block=block)
            found[block] = wrapped.error, wrapped.error_test, wrapped.extra
        for block, (error, error_test, extra) in found.items():
            rows.append({"decay": decay, "block": block, "error": error, "error_test": error_test, "extra": extra})
    table = pd.DataFrame(rows)
    write(RESULTS, table.to_csv(index=False, float_format="%.6g").encode())
    print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
