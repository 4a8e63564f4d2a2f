"""Training from nothing: what a step costs, how masks move, comparisons by seed, and nothing made twice."""

import pandas as pd
import pytest

from s3lab.errors import DataError
from s3lab.lab.study.scratch import Scratch, compare
from s3lab.models.text.pretraining import Recipe

SIZES = {"vocab": 512, "hidden": 16, "layers": 1, "intermediate": 32, "heads": 1, "kv_heads": 1, "head_dim": 16}
RECIPE = Recipe(**SIZES, steps=8, batch=2, length=16, lr=1e-2, every=4, windows=2)


def test_a_step_costs_what_its_products_do(tmp_path):
    scratch, size, head = Scratch(RECIPE, tmp_path), 4 * 16 * 16 + 3 * 16 * 32, 512 * 16
    for method, share in (("static", 0.5), ("fixed", 0.5), ("ste", 2 / 3), ("srste", 2 / 3), ("dense", 1.0)):
        assert scratch.cost("2:4", method) == pytest.approx((share * size + head) / (size + head)), method
    assert scratch.cost("2:4", "static") < scratch.cost("2:4", "rigl") < scratch.cost("2:4", "srste")
    assert scratch.cost("2:4", "static") < scratch.cost("2:4", "gradual") < 1
    assert scratch.cost("2:4", "one-shot") == pytest.approx((1 + scratch.cost("2:4", "static")) / 2)
    assert scratch.cost("1:4", "static") < scratch.cost("2:4", "static")


@pytest.mark.slow
def test_runs_end_lawfully_and_are_made_once(tmp_path, monkeypatch):
    scratch = Scratch(RECIPE, tmp_path)
    pairs = [("dense", "dense"), ("2:4", "static"), ("2:4", "ste"), ("2:4", "one-shot")]
    dense, static, ste, pruned = found = list(scratch.runs(pairs, [0]))
    assert dense["mask"] is None
    for one in found[1:]:
        assert all(sum(row[i : i + 4]) == 2 for row in one["mask"] for i in range(0, 16, 4))
    for one in found:
        assert [row["step"] for row in one["rows"]] == [4, 8]
        assert one["rows"][-1]["operations"] == pytest.approx(scratch.cost("2:4", one["rows"][0]["method"]))
    assert not any(row["churn"] for one in (dense, static, pruned) for row in one["rows"]) and ste["rows"][0]["churn"]
    monkeypatch.setattr(Scratch, "_run", None)
    assert list(Scratch(RECIPE, tmp_path).runs(pairs, [0])) == found


def test_equal_operations_are_more_steps(tmp_path):
    (one,) = Scratch(RECIPE, tmp_path).runs([("1:4", "static")], [0], "operations")
    assert one["rows"][-1]["step"] > 8 and one["rows"][-1]["operations"] == pytest.approx(1, abs=0.06)
    with pytest.raises(DataError, match="equal='time'"):
        list(Scratch(RECIPE, tmp_path).runs([("1:4", "static")], [0], "time"))


def test_seeds_are_compared_one_by_one():
    """A method 10 % above dense on every seed is so without doubt, however far the seeds are apart."""
    common = {"equal": "steps", "step": 8}
    rows = [{**common, "pattern": "dense", "method": "dense", "seed": n, "perplexity": 10.0 * n} for n in (1, 2, 3)]
    rows += [{**common, "pattern": "2:4", "method": "ste", "seed": n, "perplexity": 11.0 * n} for n in (1, 2, 3)]
    rows += [{**common, "pattern": "2:4", "method": "static", "seed": n, "perplexity": 22.0 * n} for n in (1, 2, 3)]
    rows += [{**row, "step": 4, "perplexity": 1.0} for row in rows]
    table = compare(pd.DataFrame(rows), "dense").set_index("method")
    assert table.loc["ste", ["change_percent", "low", "high"]].tolist() == pytest.approx([10, 10, 10])
    assert compare(pd.DataFrame(rows), "static")["change_percent"].tolist() == pytest.approx([-50])
    assert compare(pd.DataFrame(rows), "one-shot").empty
