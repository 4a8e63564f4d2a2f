"""Salient weights of a whole model: picked by a score, told in its rows, part of a run's settings."""

import pytest

import s3lab as s3


def prune(model, ids, **options):
    return s3.prune_model(model, None, "2:4 plus 1:16", "sparsegpt", calibration=ids, progress=False, **options)


def test_a_model_is_pruned_with_salient_weights_of_a_score(make_tiny, ids):
    model, dense = make_tiny("Llama"), make_tiny("Llama")
    run = prune(model, ids, salient="magnitude")
    assert all(row["solver"].endswith("salient by Magnitude()") for row in run.matrices)
    assert run.density == pytest.approx(0.5 + 1 / 16)
    for layer, before in zip(model.model.layers, dense.model.layers, strict=True):
        largest = s3.prune(before.mlp.up_proj.weight, "1:16", solver="magnitude").mask
        assert (layer.mlp.up_proj.weight != 0)[largest].all()


def test_a_run_with_another_score_is_another_run(make_tiny, ids, tmp_path):
    prune(make_tiny("Llama"), ids, salient="ria", out=tmp_path)
    with pytest.raises(s3.DataError, match=r"salient is 'RIA\(power=0.5\)' there, 'Wanda\(\)' here"):
        prune(make_tiny("Llama"), ids, salient="wanda", out=tmp_path)


def test_corrected_solvers_serve_a_model_too(make_tiny, ids):
    model, dense = make_tiny("Llama"), make_tiny("Llama")
    s3.prune_model(model, None, "2:4", s3.MatchVariance(s3.RIA()), calibration=ids, progress=False)
    for W, before in zip(model.model.layers.parameters(), dense.model.layers.parameters(), strict=True):
        if W.ndim == 2:
            assert W.var(1).allclose(before.var(1))
