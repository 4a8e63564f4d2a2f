"""Comparisons of pruned inputs: every combination, the model left as it was, and intervals as Student's are."""

import pandas as pd
import pytest
import torch

from s3lab.errors import DataError
from s3lab.lab.study.inputs import compare_inputs, find_gains
from s3lab.lab.study.interval import find_interval, find_quantile, share_within
from s3lab.models.inputs.calibrate import Learning
from s3lab.models.text.pretraining import RECIPES, build
from s3lab.models.text.reference import perplexity


def test_every_combination_is_a_row_and_the_model_stays():
    model = build(RECIPES["toy"]).eval()
    ids = torch.randint(0, 512, (6, 24), generator=torch.Generator().manual_seed(0))
    corrections = {"VAR": {"variance": True}, "none": {}, "LS": {"scale": True}}
    learning = Learning(steps=2, tokens=16)
    before = perplexity(model, ids[:2])
    rows = pd.DataFrame(compare_inputs(model, ids[2:], ids[:2], ["2:4", "4:4"], ["amber"], corrections, learning))
    assert perplexity(model, ids[:2]) == before == rows["dense_perplexity"].unique()
    assert len(rows) == 6 and not rows.duplicated(["pattern", "criterion", "correction"]).any()
    plain = rows[rows["correction"] == "none"].set_index(["pattern", "criterion"])["perplexity"]
    for row in rows.itertuples():
        assert row.gain_percent == pytest.approx(100 - 100 * row.perplexity / plain[row.pattern, row.criterion])
        assert row.loss_percent == pytest.approx(100 * row.perplexity / before - 100)
    kept = rows[(rows["pattern"] == "4:4") & (rows["correction"] != "LS")]
    assert kept["loss_percent"].abs().max() < 1e-3  # nothing is pruned


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.99])
def test_the_quantile_is_students(degrees, level):
    t = pytest.importorskip("scipy.stats").t
    assert find_quantile(degrees, level) == pytest.approx(t.ppf(0.5 + level / 2, degrees), rel=1e-9)
    assert share_within(1.3, degrees) == pytest.approx(2 * t.cdf(1.3, degrees) - 1, rel=1e-9)


def test_an_interval_holds_the_truth_as_often_as_it_says():
    draws = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)).double().tolist()
    held = [abs(mean) <= half for mean, half in map(find_interval, draws)]
    assert 0.94 < sum(held) / len(held) < 0.96


def test_too_little_for_an_interval_is_named():
    with pytest.raises(DataError, match="1 values at the level"):
        find_interval([1.0])
    with pytest.raises(DataError, match="no column seed"):
        find_gains(pd.DataFrame({"gain_percent": [1.0]}), ["seed"])
