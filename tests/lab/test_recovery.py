"""A model tuned by several methods: a row for each measurement, and nothing made twice."""

import pytest

from s3lab.lab.study.recovery import Recovery
from s3lab.models.recover.tuning import Tuning


@pytest.mark.slow
def test_rows_are_of_all_methods_and_made_once(tmp_path, monkeypatch):
    recovery = Recovery("tiny", {"own": "stdlib", "other": "stdlib[90%:]"}, tmp_path, sequences=4, windows=2, length=32)
    tunings = [Tuning(method=method, steps=2, tokens=64, every=1, patience=9) for method in ("fixed", "lora")]
    rows = list(recovery.rows([("2:4", "magnitude")], tunings))
    assert [(row["method"], row["step"]) for row in rows] == [("dense", 0)] + [
        (method, step) for method in ("fixed", "lora") for step in range(3)
    ]
    texts = {"own_perplexity", "other_perplexity"}
    assert all(texts < row.keys() for row in rows) and rows[1]["trained"] > rows[4]["trained"] > 0
    assert {key: rows[1][key] for key in texts} == {key: rows[4][key] for key in texts}  # one pruned model for both
    monkeypatch.setattr(Recovery, "_tune", None)
    monkeypatch.setattr(Recovery, "_measure_dense", None)
    assert list(recovery.rows([("2:4", "magnitude")], tunings)) == rows
