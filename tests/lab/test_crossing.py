"""Rows of a crossing are what pruning by hand gives, and are never made twice."""

import pytest

import s3lab
from s3lab.errors import DataError
from s3lab.lab.study.crossing import Crossing
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.reference import perplexity

pytest.importorskip("transformers")

TEXTS = {"docstrings": ["stdlib[:35%]", "stdlib[35%:70%]"], "manual": ["stdlib[80%:90%]", "stdlib[90%:]"]}
SIZES = {"dtype": "float32", "sequences": 4, "windows": 2, "length": 64}


@pytest.fixture
def crossing(tmp_path):
    return Crossing("tiny", TEXTS, tmp_path, **SIZES)


def test_a_row_is_what_pruning_by_hand_gives(crossing):
    dense, row = crossing.rows([("2:4", "sparsegpt")], ["manual"])
    model, tokenizer = load_model("tiny", "float32")
    tests = {name: corpus.tokens(tokenizer, "test", 64, 2, 0, test) for name, (_, test) in TEXTS.items()}
    for name, ids in tests.items():
        assert dense[f"{name}_perplexity"] == pytest.approx(perplexity(model, ids))
    options = {"calibration": TEXTS["manual"][0], "sequences": 4, "length": 64, "hessians": "dense"}
    run = s3lab.prune_model(model, tokenizer, "2:4", "sparsegpt", progress=False, **options)
    for name, ids in tests.items():
        assert row[f"{name}_perplexity"] == pytest.approx(perplexity(model, ids), rel=1e-5)
    errors = [one["error"] for one in run.matrices]
    assert row["error_percent"] == pytest.approx(100 * sum(errors) / len(errors))
    assert (row["density"], row["bits"]) == (0.5, 8.75)


def test_what_is_finished_is_kept_and_what_is_not_is_made(crossing, monkeypatch):
    pairs = [("2:4", "magnitude"), ("mlp-channels keep 75%", "wanda")]
    rows = list(crossing.rows(pairs, ["manual"], ["The"], tokens=2))
    assert [row["method"] for row in rows] == ["dense", "magnitude", "wanda"] and all(row["prompt_0"] for row in rows)
    assert rows[2]["bits"] == 16 * rows[2]["density"]
    made = []
    monkeypatch.setattr(Crossing, "_measure", lambda *args: made.append(args[3:6]) or {})
    assert list(crossing.rows(pairs, ["manual"], ["The"], tokens=2)) == rows and not made
    list(crossing.rows([*pairs, ("2:4", "wanda")], ["manual"], ["The"], tokens=2))
    assert made == [("2:4", "wanda", "manual")]


def test_an_unknown_method_is_told_before_anything_runs(crossing):
    with pytest.raises(DataError, match="'admm fast'"):
        next(crossing.rows([("2:4", "admm fast")], ["manual"]))
    with pytest.raises(s3lab.SolveError, match="no solver"):
        next(crossing.rows([("2:4", "adm")], ["manual"]))
