"""Measures: counted operations against their formula, the frontier against its definition, exponents of known laws."""

import pandas as pd
import pytest
import torch

import s3lab as s3
from s3lab.lab.study import bench
from s3lab.models.measure.layers import generate_layer

LAYER = generate_layer(8, 16, 64)


def test_every_method_prunes_and_is_measured():
    rows = bench.measure(bench.make_methods(LAYER, "2:4", list(bench.METHODS), 1e-2), LAYER)
    assert [row["method"] for row in rows] == list(bench.METHODS)
    for row in rows:
        assert row["time_20_s"] <= row["time_s"] <= row["time_80_s"]
        assert 0 < row["error"] < 1 and 0 < row["error_test"] < 1.5


def test_products_are_counted_as_two_operations_a_term():
    weight = torch.ones(8, 16)
    (row,) = bench.measure({"product": lambda: (weight @ torch.eye(16)) * 0.5}, LAYER, repeats=2)
    assert row["product_gflop"] == 2 * 8 * 16 * 16 / 1e9 and row["repeats"] == 2
    assert row["error"] == pytest.approx(s3.output_error(weight * 0.5, LAYER.W, LAYER.H))


def test_the_frontier_is_what_nothing_beats_on_both():
    table = pd.DataFrame({"by": list("aaabb"), "cost": [1, 2, 3, 2, 1], "loss": [3.0, 3.0, 1.0, 1.0, 2.0]})
    marked = bench.mark_frontier(table, "cost", "loss", ["by"])
    for i, row in marked.iterrows():
        rivals = marked[(marked["by"] == row["by"]) & (marked.index != i)]
        beaten = ((rivals["cost"] <= row["cost"]) & (rivals["loss"] <= row["loss"])).any()
        assert row["frontier"] == (not beaten)


def test_an_exponent_is_that_of_the_law():
    table = pd.DataFrame({"K": [1, 2, 4, 8], "time": [3.0, 24.0, 192.0, 1536.0]})
    assert bench.fit_exponent(table, "K", "time") == pytest.approx(3)
    with pytest.raises(s3.DataError, match="two values"):
        bench.fit_exponent(table[:1], "K", "time")


def test_an_unknown_method_is_named():
    with pytest.raises(s3.DataError, match="magic"):
        bench.make_methods(LAYER, "2:4", ["magic"], 1e-2)


def test_the_peak_is_a_speed():
    assert bench.measure_peak(size=64, repeats=1) > 0
