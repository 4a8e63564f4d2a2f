"""Transposable N:M: the best mask by enumeration, the optimum by linear programming, and what must not matter."""

from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import eye_array, kron, vstack

import s3lab as s3
from s3lab.algebra.count import count_squares
from s3lab.algebra.lines import choose_lines

KINDS = {
    "uniform": lambda shape, draw: torch.rand(shape, generator=draw, dtype=torch.float64),
    "heavy-tailed": lambda shape, draw: torch.randn(shape, generator=draw, dtype=torch.float64) ** 2,
    "very heavy": lambda shape, draw: (8 * torch.randn(shape, generator=draw, dtype=torch.float64)).exp(),
    "with ties": lambda shape, draw: torch.randint(-2, 3, shape, generator=draw).double(),
    "an outlier": lambda shape, draw: torch.rand(shape, generator=draw).double().index_fill(1, torch.tensor([1]), 1e9),
}


def squares(kind, n, side, seed=0):
    return KINDS[kind]((n, side * side), torch.Generator().manual_seed(seed))


def all_masks(side, keep):
    """Every mask with ``keep`` in each row and column."""
    rows = [[i in chosen for i in range(side)] for chosen in combinations(range(side), keep)]
    found = torch.tensor(list(product(rows, repeat=side)))
    return found[(found.sum(1) == keep).all(1)].flatten(1)


def best_score(scores, side, keep):
    """The optimum of the transport, whose vertices are masks: an interior one would score no less."""
    one, ones = eye_array(side), np.ones((1, side))
    lines = vstack([kron(one, ones), kron(ones, one)]).tocsr()
    sums = np.full(2 * side, keep)
    return [-linprog(-s, A_eq=lines, b_eq=sums, bounds=(0, 1), method="highs").fun for s in scores.numpy()]


def check_lines(kept, side, keep):
    square = kept.view(-1, side, side)
    assert (square.sum(1) == keep).all() and (square.sum(2) == keep).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("side", "keep", "count"), [(2, 1, 2), (3, 2, 6), (4, 1, 24), (4, 2, 90), (4, 3, 24), (5, 2, 2040)]
)
def test_the_best_of_all_masks(kind, side, keep, count):
    masks = all_masks(side, keep)
    assert len(masks) == count == count_squares(side, keep)
    scores = squares(kind, 300, side)
    kept = choose_lines(scores, keep)
    check_lines(kept, side, keep)
    torch.testing.assert_close((scores * kept).sum(1), (scores @ masks.double().T).amax(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize(("kind", "n"), [("uniform", 500), ("heavy-tailed", 500), ("very heavy", 20)])
def test_the_optimum_at_8_of_16(kind, n):
    scores = squares(kind, n, 16)
    kept = choose_lines(scores, 8)
    check_lines(kept, 16, 8)
    assert (scores * kept).sum(1).numpy() == pytest.approx(best_score(scores, 16, 8), rel=1e-9)


@pytest.mark.parametrize(("side", "keep"), [(7, 3), (16, 1), (16, 5), (24, 20), (32, 16), (1, 1), (6, 6)])
def test_the_optimum_of_other_squares(side, keep):
    scores = squares("heavy-tailed", 5, side)
    kept = choose_lines(scores, keep)
    check_lines(kept, side, keep)
    assert (scores * kept).sum(1).numpy() == pytest.approx(best_score(scores, side, keep), rel=1e-9)


@given(st.integers(2, 9), st.data())
def test_what_the_best_mask_does_not_depend_on(side, data):
    keep, seed = data.draw(st.integers(1, side - 1)), data.draw(st.integers(0, 99))
    scores = squares("heavy-tailed", 3, side, seed).view(3, side, side)

    def choose(scores, keep=keep):
        return choose_lines(scores.flatten(1), keep).view(3, side, side)

    kept, draw = choose(scores), torch.Generator().manual_seed(seed)
    rows, columns = torch.randn(3, side, 1, generator=draw), torch.randn(3, 1, side, generator=draw)
    order = torch.randperm(side, generator=draw)
    assert torch.equal(choose(scores + rows + columns), kept)
    assert torch.equal(choose(1e-30 * scores), kept)
    assert torch.equal(choose(-scores, side - keep), ~kept)
    assert torch.equal(choose(scores.mT).mT, kept)
    assert torch.equal(choose(scores[:, order]), kept[:, order])


@pytest.mark.parametrize(("side", "keep"), [(4, 2), (16, 8)])
def test_a_mask_is_the_best_for_itself(side, keep):
    kept = choose_lines(squares("uniform", 50, side), keep)
    assert torch.equal(choose_lines(kept, keep), kept)


def test_equal_scores_give_equal_masks():
    scores = squares("with ties", 100, 16)
    kept = choose_lines(scores, 8)
    check_lines(kept, 16, 8)
    assert torch.equal(choose_lines(scores, 8), kept)
    assert torch.equal(choose_lines(scores.T.contiguous().T, 8), kept)


def test_a_square_is_decided_alone():
    scores = squares("uniform", 3000, 16)  # more than are decided at a time
    kept = choose_lines(scores, 8)
    for i in (0, 2047, 2048, 2999):
        assert torch.equal(choose_lines(scores[i : i + 1], 8), kept[i : i + 1])


@pytest.mark.parametrize("value", [0.0, 3.0, -1e300, 1e308, 5e-324])
def test_equal_scores_are_no_trouble(value):
    check_lines(choose_lines(torch.full((2, 64), value, dtype=torch.float64), 3), 8, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.bool])
def test_any_real_dtype(dtype):
    scores = (8 * squares("uniform", 10, 8)).to(dtype)
    kept = choose_lines(scores, 4)
    assert kept.dtype == torch.bool and torch.equal(kept, choose_lines(scores.double(), 4))


def test_no_squares_no_masks():
    assert choose_lines(torch.zeros(0, 16), 2).shape == (0, 16)


def test_a_weight_and_its_transpose_are_n_of_m():
    W = squares("heavy-tailed", 32, 32).view(32, 1024)
    mask = s3.parse("8:16 each way").bind((32, 1024)).project(W)
    for text, seen in (("8:16", mask), ("8:16", mask.T.contiguous())):
        s3.parse(text).check(seen)


@pytest.mark.parametrize(
    ("shape", "keep", "error", "message"),
    [
        ((2, 16), 0, s3.SpecError, "keep 0 .* side 4.*between 1 and 4"),
        ((2, 16), 5, s3.SpecError, "keep 5 .* side 4.*between 1 and 4"),
        ((2, 15), 2, s3.ShapeError, r"\(2, 15\) are no squares"),
        ((2, 4, 4), 2, s3.ShapeError, "no squares"),
    ],
)
def test_what_cannot_be_chosen(shape, keep, error, message):
    with pytest.raises(error, match=message):
        choose_lines(torch.zeros(shape), keep)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_refused(value):
    scores = torch.zeros(2, 16)
    scores[1, 3] = value
    with pytest.raises(s3.ShapeError, match="NaN or Inf"):
        choose_lines(scores, 2)
