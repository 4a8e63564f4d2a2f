"""Stacks of what surrounds a mask are what doing it by hand gives, and are never made twice."""

import pandas as pd
import pytest

import s3lab as s3
from s3lab.errors import DataError
from s3lab.lab.study.stack import TOGETHER, Stacking, find_cuts, list_stacks
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.reference import perplexity

pytest.importorskip("transformers")

SIZES = {"dtype": "float32", "sequences": 4, "windows": 2, "length": 64, "rotation": "hadamard", "block": 8}
FAMILIES = {"8:16": "{n in 7..9}:16"}


@pytest.fixture
def study(tmp_path):
    return Stacking("tiny", {"manual": ["stdlib[80%:90%]", "stdlib[90%:]"]}, tmp_path, **SIZES)


def test_a_row_is_what_the_steps_by_hand_give(study):
    stacks = {"plain": (), "both": ("rotate", "loss")}
    plain, both = study.rows(FAMILIES, stacks, [0])
    for row, stack in ((plain, False), (both, True)):
        model, tokenizer = load_model("tiny", "float32")
        ids = corpus.tokens(tokenizer, "calibration", 64, 4, 0, "stdlib[80%:90%]")
        if stack:
            s3.rotate(model, "hadamard", ids)
        weighing = {"hessians": "dense", "hessian": "loss" if stack else "inputs"}
        s3.prune_model(model, None, "8:16", "sparsegpt", calibration=ids, **weighing, progress=False)
        test = corpus.tokens(tokenizer, "test", 64, 2, 0, "stdlib[90%:]")
        assert row["manual_perplexity"] == pytest.approx(perplexity(model, test), rel=1e-4)
        assert row["bits"] == 16.875


def test_a_budget_stays_within_the_bits_of_the_pattern(study):
    (row,) = study.rows(FAMILIES, {"budget": ("budget",)}, [0])
    assert row["bits"] == pytest.approx(16.875, rel=5e-3)


def test_what_is_finished_is_kept_and_what_is_not_is_made(study, monkeypatch):
    rows = list(study.rows(FAMILIES, {"plain": ()}, [0]))
    made = []
    monkeypatch.setattr(Stacking, "_prune", lambda self, **told: made.append(told) or {})
    assert list(study.rows(FAMILIES, {"other name": ()}, [0])) == [{**rows[0], "stack": "other name"}] and not made
    list(study.rows(FAMILIES, {"plain": (), "wrap": ("wrap",)}, [0, 1]))
    assert [(told["seed"], told["stack"]) for told in made] == [(0, ["wrap"]), (1, []), (1, ["wrap"])]


def test_rivals_are_rounded_and_smaller_dense_models(study):
    dense, rounded, small = study.rivals(["int8"], ["small"])
    assert (dense["bits"], rounded["bits"]) == (32.0, pytest.approx(8 + 32 / 128, rel=0.02))
    assert small["bits"] > 32 and rounded["manual_perplexity"] == pytest.approx(dense["manual_perplexity"], rel=0.02)


def test_every_ingredient_is_alone_left_out_and_in_all():
    stacks = list_stacks()
    for one in TOGETHER:
        assert stacks[one] == (one,) and set(stacks[f"all but {one}"]) == set(TOGETHER) - {one}
    assert stacks["plain"] == () and stacks["all"] == TOGETHER and len(stacks) == 2 * len(TOGETHER) + 2


def test_cuts_are_of_the_rise_over_dense_seed_by_seed():
    rows = pd.DataFrame(
        {"pattern": "2:4", "seed": [0, 0, 1, 1], "stack": ["plain", "all"] * 2, "a_perplexity": [30.0, 25, 40, 25]}
    )
    (cut,) = find_cuts(rows, {"a_perplexity": 20.0}, ["a_perplexity"]).to_dict("records")
    assert (cut["stack"], cut["cut_percent"], cut["seeds"]) == ("all", 62.5, 2)
    assert cut["low"] == pytest.approx(62.5 - 12.706 * 12.5, rel=1e-3)  # Student's t of one degree of freedom


def test_an_unknown_ingredient_is_told_before_anything_runs(study):
    with pytest.raises(DataError, match="'salt'"):
        next(study.rows(FAMILIES, {"a": ("salt",)}, [0]))
