"""Second moments and errors by their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import s3lab as s3
from s3lab.tensors.incidence import arrange, link, share, tabulate


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_batches_add_up(sizes):
    X = draw(sum(sizes), 6, dtype=torch.float64)
    torch.testing.assert_close(s3.hessian(list(X.split(sizes))), (X.T @ X / len(X)).float())


def test_an_iterator_and_leading_modes_are_fine():
    X = draw(4, 5, 6)
    expected = s3.hessian(X.view(20, 6))
    torch.testing.assert_close(s3.hessian(X), expected)
    torch.testing.assert_close(s3.hessian(x for x in X), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32_or_better(dtype):
    X = draw(50_000, 3).to(dtype)
    exact = (X.double().T @ X.double() / len(X)).float()
    torch.testing.assert_close(s3.hessian(X), exact, rtol=1e-5, atol=1e-5)


def test_output_error_is_the_papers_measure():
    W, W_hat, X = draw(5, 6), draw(5, 6, seed=1), draw(40, 6, seed=2)
    expected = (X @ (W_hat - W).T).norm() / (X @ W.T).norm()
    assert s3.output_error(W_hat, W, s3.hessian(X)) == pytest.approx(float(expected), rel=1e-5)
    assert s3.output_error(W, W, s3.hessian(X)) == 0


def test_problem_factors_are_inverses():
    H = s3.hessian(draw(40, 6))
    problem = s3.Problem(draw(3, 6).double(), H, damp=0.05)
    damped = H.double() + 0.05 * H.double().diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(problem.hessian, damped)
    torch.testing.assert_close(problem.inverse @ damped, torch.eye(6).double())
    torch.testing.assert_close(damped @ problem.divide(damped), damped)
    for order in (torch.arange(6), torch.tensor([3, 1, 0, 5, 4, 2])):
        R = problem.factor(order)
        assert torch.equal(R, R.triu())
        torch.testing.assert_close(R @ R.T, damped[order][:, order])


@given(st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=12))
def test_link_finds_connected_components(edges):
    label = link(torch.tensor(edges), 10).tolist()
    reach = {i: {i} for i in range(10)}
    for _ in range(10):
        for a, b in edges:
            reach[a] = reach[b] = reach[a] | reach[b]
            for c in reach[a]:
                reach[c] = reach[a]
    assert label == [min(reach[i]) for i in range(10)]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 9))
def test_arrange_cuts_no_label(labels, width):
    order, windows = arrange(torch.tensor(labels), width)
    assert sorted(order.tolist()) == list(range(len(labels)))
    assert [start for start, _ in windows] == [0, *(stop for _, stop in windows[:-1])] and windows[-1][1] == len(labels)
    homes = [{labels[i] for i in order[start:stop].tolist()} for start, stop in windows]
    assert sum(len(home) for home in homes) == len(set(labels))
    assert all(stop - start <= width or len(home) == 1 for (start, stop), home in zip(windows, homes, strict=True))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_tabulate_gathers_by_key(keys):
    table = tabulate(torch.arange(len(keys)), torch.tensor(keys))
    rows = {int(k): [i for i in row.tolist() if i >= 0] for k, row in zip(table.keys, table.items, strict=True)}
    assert rows == {k: [i for i, key in enumerate(keys) if key == k] for k in sorted(set(keys))}
    assert table.counts.tolist() == [len(rows[k]) for k in sorted(rows)]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.data())
def test_share_is_exact_and_fits(counts, data):
    total = data.draw(st.integers(0, sum(counts)))
    parts = share(torch.tensor([total]), torch.tensor([counts]))[0].tolist()
    assert sum(parts) == total and all(0 <= p <= n for p, n in zip(parts, counts, strict=True))
