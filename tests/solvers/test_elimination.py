"""What columns cost and leave as they go, against an explicit inverse for every group."""

import pytest
import torch

from s3lab.solvers.elimination import Elimination, list_columns, weigh


def draw(G, n, R, shared, seed=0):
    """C (1 or G, n, n), positive definite, and w (G, n, R)."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(1 if shared else G, n, 2 * n, generator=generator, dtype=torch.float64)
    return root @ root.mT / n, torch.randn(G, n, R, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_columns_are_listed_in_order_and_padded(seed):
    gone = torch.rand(5, 9, generator=torch.Generator().manual_seed(seed)) < 0.4
    listed = [row.nonzero()[:, 0].tolist() for row in gone]
    longest = max(map(len, listed))
    assert list_columns(gone).tolist() == [row + [-1] * (longest - len(row)) for row in listed]
    assert list_columns(torch.zeros(2, 3, dtype=torch.bool)).shape == (2, 0)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("e", [1, 2, 4, 5, 7])
def test_a_set_costs_what_its_inverse_says(e, shared, alike, ragged):
    G, n, R, m = 3, 9, 2, 4
    C, w = draw(G, n, R, shared)
    order = torch.rand(1 if alike else G, m, n, generator=torch.Generator().manual_seed(1)).argsort(-1)
    sets = order[..., :e].clone()
    if ragged:
        sets[:, ::2, e // 2 :] = -1
    cost = weigh(C, w, sets)
    assert cost.shape == (G, m)
    for g in range(G):
        for i in range(m):
            P = [j for j in sets[0 if alike else g, i].tolist() if j >= 0]
            own = C[0 if shared else g][P][:, P]
            assert float(cost[g, i]) == pytest.approx(float(torch.trace(w[g, P].T @ torch.linalg.inv(own) @ w[g, P])))


@pytest.mark.parametrize("first", [[[0, 3], [1, -1], [-1, -1]], [[0, 3], [1, 2], [4, 0]]], ids=["ragged", "full"])
def test_what_is_removed_is_felt_by_all_columns_opened_later(first):
    """Of three groups, in two runs of columns, and by the weights that are left in the end."""
    G, n, R = 3, 9, 2
    C0, W = draw(G, n, R, shared=True)
    part, lost = Elimination(W, C0[0]), [[], [], []]
    for start, stop, removals in ((0, 5, [first, [[2], [4], [3]]]), (5, 9, [[[1], [0], [3]]])):
        part.open(start, stop)
        for removal in removals:
            part.remove(torch.tensor(removal))
            for own, new in zip(lost, removal, strict=True):
                own.extend(start + j for j in new if j >= 0)
            for g, P in enumerate(lost):
                left = [j for j in range(start, stop) if j not in P]
                gain = C0[0][left][:, P] @ torch.linalg.inv(C0[0][P][:, P])
                at = [j - start for j in left]
                torch.testing.assert_close(part.C[g][at][:, at], C0[0][left][:, left] - gain @ C0[0][P][:, left])
                torch.testing.assert_close(part.w[g, at], W[g, left] - gain @ W[g, P])
        part.close()
    found = W - C0 @ part.dual()
    for g, P in enumerate(lost):
        gain = C0[0][:, P] @ torch.linalg.inv(C0[0][P][:, P])
        torch.testing.assert_close(found[g], W[g] - gain @ W[g, P])
