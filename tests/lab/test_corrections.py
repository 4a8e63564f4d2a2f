"""Combinations of pattern, solver and correction: what they cost in bits, what they leave alone, what they refuse."""

import pytest
import torch

from s3lab.algebra.patterns import parse
from s3lab.errors import DataError
from s3lab.lab.study.corrections import CORRECTIONS, Comparison
from s3lab.models.correct.finetune import Schedule
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.pretraining import RECIPES, build


@pytest.fixture(scope="module")
def ground():
    """A comparison on an untrained toy."""
    ids = torch.randint(0, 512, (10, 32), generator=torch.Generator().manual_seed(0))
    return Comparison(build(RECIPES["toy"]).eval(), ids, ids[:2], salient="4:32", schedule=Schedule(epochs=1))


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_bits_are_those_of_the_weights_and_of_the_pattern(ground, correction):
    before = {name: p.clone() for name, p in ground.dense.named_parameters()}
    row = ground.measure("8:16", "ria", correction)
    more = 4 / 32 if correction == "salient" else 0
    spec = parse("8:16 plus 4:32" if more else "8:16").bind((64, 64))
    assert row["density"] == pytest.approx(0.5 + more)
    assert row["index_bits"] == pytest.approx(spec.storage_bits)
    assert row["bits"] == pytest.approx(16 * (0.5 + more) + spec.storage_bits)
    assert 0 < row["error_test"] < 1 and row["perplexity"] > 1
    assert all(torch.equal(p, before[name]) for name, p in ground.dense.named_parameters())


def test_a_model_weighs_as_much_as_its_bits_say(ground):
    row = ground.measure_dense(ground.dense, "itself")
    assert row["bits"] == pytest.approx(16) and row["solver"] == "itself"
    smaller = build(RECIPES["toy"])
    smaller.model.layers = smaller.model.layers[:1]
    matrices = sum(p.numel() for p in ground.dense.model.layers.parameters() if p.ndim == 2)
    lost = sum(p.numel() for p in ground.dense.model.layers[1].parameters())
    assert ground.measure_dense(smaller, "half")["bits"] == pytest.approx(16 * (1 - lost / matrices))


def test_the_smaller_model_that_ships_weighs_no_more_than_the_larger_at_8_16(ground):
    larger, smaller = (load_model(name)[0] for name in ("reference", "small"))
    row = Comparison(larger, ground.calibration, ground.test).measure_dense(smaller, "small")
    assert 8 < row["bits"] <= 16 / 2 + parse("8:16").bind((256, 256)).storage_bits


def test_other_corrections_are_refused(ground):
    with pytest.raises(DataError, match="there are none, equalise, variance, both, salient, finetune"):
        ground.measure("8:16", "ria", "hope")
