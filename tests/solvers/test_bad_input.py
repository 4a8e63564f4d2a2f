"""Bad input ends in one clear sentence, or, where it can be served, in a result that says what was done."""

import pytest
import torch

import s3lab as s3
from s3lab.solvers.variance import match_variance

W, X = (
    torch.randn(4, 8, generator=torch.Generator().manual_seed(0)),
    torch.randn(64, 8, generator=torch.Generator().manual_seed(1)),
)
H = s3.hessian(X)


def spoilt(tensor, value):
    tensor = tensor.clone()
    tensor[1, 2] = value
    return tensor


@pytest.mark.parametrize("name", s3.SOLVERS)
@pytest.mark.parametrize(
    ("weight", "moment", "message"),
    [
        (spoilt(W, torch.nan), H, "W holds NaN or Inf"),
        (spoilt(W, torch.inf), H, "W holds NaN or Inf"),
        (W, spoilt(H, torch.nan), "H holds NaN or Inf"),
        (W, spoilt(H, -torch.inf), "H holds NaN or Inf"),
        (W, spoilt(H, 7.0), "H is not symmetric"),
        (W, H[:4], r"H of shape \(4, 8\)"),
        (W, H[:4, :4], r"H of shape \(4, 4\).*expected real \(8, 8\)"),
        (W, -torch.eye(8), "negative diagonal"),
        (W[None], H, "expected a real matrix"),
        (W[0], H, "expected a real matrix"),
        (W[:, :0], H[:0, :0], "expected a real matrix"),
        (W.long(), H, "expected a real matrix"),
    ],
)
def test_weights_and_moments_that_cannot_be(name, weight, moment, message):
    with pytest.raises(s3.ShapeError, match=message):
        s3.prune(weight, "2:4", moment, name)


COUNTS = torch.tensor([4.0, 0.25, 64.0, 1.0])


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (COUNTS[:3], r"outputs of shape \(3,\)"),
        (COUNTS[:, None], r"outputs of shape \(4, 1\)"),
        (-COUNTS, "negative, NaN or Inf"),
        (COUNTS * torch.nan, "negative, NaN or Inf"),
        (COUNTS.long(), "outputs is of torch.int64"),
        ([1.0, 2.0, 3.0, 4.0], "outputs is a list"),
    ],
)
def test_outputs_that_cannot_be(outputs, message):
    with pytest.raises(s3.ShapeError, match=message):
        s3.prune(W, "2:4", H, "magnitude", outputs=outputs)
    with pytest.raises(s3.SolveError, match="outputs of b, of which there is no weight"):
        s3.prune({"a": W}, "a: (1,1) keep 50%", {"a": H}, outputs={"b": outputs})


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_inputs_must_be_finite(bad):
    with pytest.raises(s3.ShapeError, match="X hold NaN or Inf"):
        s3.hessian(spoilt(X, bad))


def test_no_tokens_no_moment():
    for nothing in (X[:0], [], [X[:0], X[:0]]):
        with pytest.raises(s3.ShapeError, match="no tokens"):
            s3.hessian(nothing)
    with pytest.raises(s3.ShapeError, match="K = 0"):
        s3.hessian(X[:, :0])
    with pytest.raises(s3.ShapeError, match="K = 4 inputs after batches of K = 8"):
        s3.hessian([X, X[:, :4]])


def test_a_spec_that_does_not_divide_names_the_mode():
    with pytest.raises(s3.SpecError, match="mode 1"):
        s3.prune(W[:, :6], "2:4", H[:6, :6])


@pytest.mark.parametrize("name", ["sparsegpt", "sobs", "obd"])
def test_a_singular_moment_is_damped_and_says_so(name):
    narrow = s3.hessian(X[:3])
    found = s3.prune(W, "2:4", narrow, solver=name, damp=0.0)
    assert found.stats["damp"] > 0 and found.weight.isfinite().all()
    s3.parse("2:4").check(found.mask)
    assert s3.prune(W, "2:4", narrow, solver=name, damp=0.1).stats["damp"] == 0.1


def test_an_indefinite_moment_is_refused():
    ring = torch.eye(8).roll(1, 0)
    indefinite = torch.eye(8) - 1e4 * (ring + ring.T)
    with pytest.raises(s3.SolveError, match="not positive definite"):
        s3.prune(W, "2:4", indefinite)


def test_options_that_cannot_be():
    for make in (
        lambda: s3.SOBS(batch=0),
        lambda: s3.SOBS(order="right"),
        lambda: s3.SOBS(scoring="all"),
        lambda: s3.SOBS(rows=0),
        lambda: s3.SparseGPT(width=0),
        lambda: s3.Refit(max_steps=0),
        lambda: s3.Best(s3.ADMM(), ("wanda",)),
        lambda: s3.Refit(tolerance=0.0),
        lambda: s3.RIA(power=float("inf")),
        lambda: s3.prune(W, "2:4", H, damp=-1.0),
        lambda: s3.prune(W, "2:4", H, damp=float("nan")),
        lambda: s3.prune(W, "2:4", H, solver="obs"),
        lambda: s3.prune(W, "2:4", solver="wanda"),
        lambda: s3.prune(W, "2:4", solver="sobs"),
    ):
        with pytest.raises(s3.SolveError):
            make()


def test_magnitude_needs_no_moment():
    found = s3.prune(W, "2:4", solver="magnitude")
    assert found.error is None and found.mask.sum() == 16


def test_a_weight_beyond_half_precision_is_told():
    huge = (W * 3e4).half().clamp(-65000, 65000)
    correlated = s3.hessian(X[:, :1].expand(64, 8) + 0.01 * X)
    with pytest.raises(s3.SolveError, match=r"beyond the range of torch\.float16"):
        s3.prune(huge, "1:8", correlated, solver="sobs", damp=0.0)


def test_variance_is_matched_of_one_matrix_by_rows_or_whole_after_a_solver():
    with pytest.raises(s3.SolveError, match="such as s3lab"):
        s3.MatchVariance("wanda")
    with pytest.raises(s3.SolveError, match="'row' or over the whole 'matrix'"):
        s3.MatchVariance(s3.Wanda(), per="column")
    with pytest.raises(s3.ShapeError, match="one matrix twice"):
        match_variance(W, W.T)


def test_what_is_given_in_vain_is_named():
    pair = "a: (1,1) | b: (1,1) keep 50%"
    for arguments, told in (
        (({"a": W}, pair, {"a": H, "c": H, "d": H}), "second moments or outputs of c, d, of which"),
        (({"a": W}, pair, H), "second moments or outputs of no name, of which"),
        (({}, pair), "no weights: give a tensor"),
        ((W, "2:4", H, "obs"), "no solver is called 'obs': use one of magnitude, wanda"),
        ((W, "2:4", H, 7), "no solver is called 7"),
    ):
        with pytest.raises(s3.SolveError, match=told):
            s3.prune(*arguments)
    with pytest.raises(s3.SolveError, match="refine = 3: True, False, or a Refine"):
        s3.prune(W, "2:4", H, refine=3)
    with pytest.raises(s3.SolveError, match=r"salient = 'sobs' .* use one of magnitude, wanda, ria, obd$"):
        s3.prune(W, "2:4", H, salient="sobs")
    with pytest.raises(s3.SolveError, match="effort is one of quick, balanced, thorough"):
        s3.ADMM(effort="hasty")
