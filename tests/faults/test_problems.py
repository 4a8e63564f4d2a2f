"""Problems at the edges of what can be, by all solvers on all patterns: a right answer, or the package's own error."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import s3lab as s3
from s3lab.tensors.units import shift

# of every kind of scope and block, of composed patterns and couplings, each on a small weight that it fits
PATTERNS = {
    **{name: (128, 256) for name in s3.PATTERNS},
    "2:4": (8, 16),
    "1:2@2x1": (8, 16),
    "50%/row": (8, 16),
    "25%/column": (8, 16),
    "50%": (8, 16),
    "coupled-2:4": (8, 32),
    "block16": (16, 32),
    "pairs-4:8": (8, 16),
    "2:4 each way": (8, 16),
    "4:8@8x1 then 2:4": (8, 16),
    "2:4 plus 1:8": (8, 16),
    "4:4": (8, 16),
}
SMALL = [text for text, (M, _) in PATTERNS.items() if M < 32]
DTYPES = {torch.float64: 100, torch.float32: 100, torch.bfloat16: 100, torch.float16: 4}  # and how far W is scaled
KINDS = ("plain", "repeated", "outliers", "dead", "few tokens", "flat", "zero", "one input")


def draw_inputs(kind, K, generator):
    X = torch.randn(3 * K if kind != "few tokens" else K // 2, K, generator=generator, dtype=torch.float64)
    if kind != "plain":
        X = X @ torch.randn(K, K, generator=generator, dtype=torch.float64)
    if kind == "repeated":
        X[:, K // 2 :] = X[:, : K // 2]
    if kind == "outliers":
        X[:, :3] *= 1e3
    if kind == "dead":
        X[:, ::3] = 0
    if kind == "flat":
        X = X * torch.logspace(0, -8, K, dtype=torch.float64)
    if kind == "one input":
        X[:, 1:] = 0
    return X * (kind != "zero")


def lay(W, how):
    """The same weight in another layout of memory."""
    return {"rows": W, "columns": W.T.contiguous().T, "strided": torch.stack([W, W], 2)[..., 0]}[how]


def cases(patterns):
    """What a problem is made of: pattern, kind of inputs, dtype, layout, scales by powers of two, damping, seed."""
    exponents = st.tuples(*[st.integers(-100, 100)] * 2)
    layouts = st.sampled_from(["rows", "columns", "strided"])
    of = map(st.sampled_from, (patterns, KINDS, list(DTYPES)))
    return st.tuples(*of, layouts, exponents, st.sampled_from([0.0, 1e-2]), st.integers(0, 2**32))


def make(text, kind, dtype, seed):
    M, K = PATTERNS[text]
    generator = torch.Generator().manual_seed(seed)
    W, H = torch.randn(M, K, generator=generator).to(dtype), s3.hessian(draw_inputs(kind, K, generator))
    return W, H.to(torch.float64 if dtype == torch.float64 else torch.float32)


def check(solver, case):
    text, kind, dtype, how, (by_W, by_H), damp, seed = case
    W, H = make(text, kind, dtype, seed)
    found = s3.prune(W, text, H, solver, damp=damp)
    s3.parse(text).check(found.mask)
    assert found.weight.dtype == dtype and found.weight.isfinite().all() and not found.weight[~found.mask].any()
    assert 0 <= found.error < 10
    if text == "4:4":
        assert torch.equal(found.weight, W) and found.error == 0
    by_W = by_W * DTYPES[dtype] // 100
    scaled_W, scaled_H = shift(W, by_W), shift(H, by_H)
    # what cannot be scaled exactly is another problem
    assume(torch.equal(shift(scaled_W, -by_W), W) and torch.equal(shift(scaled_H, -by_H), H))
    scaled = s3.prune(lay(scaled_W, how), text, scaled_H, solver, damp=damp)
    assert torch.equal(scaled.mask, found.mask) and scaled.error == found.error
    assert torch.equal(shift(scaled.weight, -by_W), found.weight)


@given(st.sampled_from(list(s3.SOLVERS)), cases(SMALL))
@settings(max_examples=100)
def test_a_solution_is_whole_and_scales_with_its_problem(solver, case):
    check(solver, case)


@pytest.mark.slow
@given(st.sampled_from(list(s3.SOLVERS)), cases(list(PATTERNS)))
@settings(max_examples=600)
def test_so_it_is_at_length(solver, case):
    check(solver, case)


W, H = (draw_inputs("repeated", 16, torch.Generator().manual_seed(seed)).float() for seed in (0, 1))
W, H = W[:8], s3.hessian(H)


@pytest.mark.parametrize("name", s3.SOLVERS)
@pytest.mark.parametrize(("by_W", "by_H"), [(60, 0), (-100, 0), (0, 100), (0, -120), (66, -99)])
def test_no_mask_hangs_on_the_scale_of_a_weight_or_of_its_inputs(name, by_W, by_H):
    found, scaled = (s3.prune(shift(W, a), "2:4", shift(H, b), name) for a, b in ((0, 0), (by_W, by_H)))
    assert torch.equal(found.mask, scaled.mask) and found.error == scaled.error
    assert torch.equal(shift(found.weight, by_W), scaled.weight)


@pytest.mark.parametrize("name", s3.SOLVERS)
def test_tensors_that_share_a_budget_share_their_scale(name):
    text = "q: (1,1) | k: (1,1) keep 50%"
    layers = [{"q": shift(W, a), "k": shift(W / 8, a)} for a in (0, 70)]
    found, scaled = (s3.prune(each, text, {"q": H, "k": 2 * H}, name) for each in layers)
    assert found["q"].mask.sum() > (0 if name == "ria" else 1.2 * found["k"].mask.sum())
    for one in "qk":
        assert torch.equal(found[one].mask, scaled[one].mask)
        assert torch.equal(shift(found[one].weight, 70), scaled[one].weight)


@pytest.mark.parametrize("name", s3.SOLVERS)
@pytest.mark.parametrize("text", ["4:4", "99.999%", "16:16@8x1"])
@pytest.mark.parametrize("options", [{}, {"refit": True}, {"damp": 1.0}])
def test_what_prunes_nothing_gives_the_weight_back_to_the_bit(name, text, options):
    found = s3.prune(W, text, H, name, **options)
    assert torch.equal(found.weight, W) and found.weight.data_ptr() != W.data_ptr() and found.error == 0


def test_a_moment_of_inputs_beyond_the_range_of_their_squares_is_right_or_refused():
    X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(s3.hessian(shift(X, -60)), shift(s3.hessian(X), -120))
    moment = s3.Moment()
    moment.add(shift(X, -100))
    assert torch.equal(shift(moment.value(torch.float64), 200).float(), s3.hessian(X))
    for by in (-100, 100):
        with pytest.raises(s3.ShapeError, match="squares of the inputs leave the range"):
            s3.hessian(shift(X, by))


def test_a_moment_may_remember_how_it_was_made():
    for name in s3.SOLVERS:
        s3.prune(torch.nn.Parameter(W), "2:4", H.clone().requires_grad_(), name, H_test=H.clone().requires_grad_())
