"""Whatever is made on the way lies where the weight does, also where torch's default device is another one."""

import pytest
import torch

import s3lab as s3

SPECS = ["2:4", "coupled-2:4", "50%", "50% columns", "1:2@2x4", "2:4 each way", "2:4 plus 2:16", "4:8@8x1 then 2:4"]


def layer(M=16, K=32):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(64, K, generator=generator)
    return torch.randn(M, K, generator=generator), s3.hessian(X)


def same_wherever_the_default_is(W, text, H, *arguments, **options):
    """A tensor on the meta device holds nothing, and meets none that does."""
    expected = s3.prune(W, text, H, *arguments, **options)
    with torch.device("meta"):
        found = s3.prune(W, text, H, *arguments, **options)
    expected, found = ([x] if isinstance(x, s3.Solution) else list(x.values()) for x in (expected, found))
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("solver", ["ria", "sparsegpt", "sobs", "admm"])
def test_solvers_make_their_tensors_where_the_weight_is(solver, text):
    same_wherever_the_default_is(*layer()[:1], text, layer()[1], solver)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("2:4", {"solver": s3.SOBS(rows=3, batch=2)}),
        ("1:2@2x4", {"solver": s3.SOBS(rows=3, scoring="independent")}),
        ("50%", {"solver": s3.SOBS(rows=3, order="left")}),
        ("50%", {"solver": s3.SparseGPT(width=8)}),
        ("2:4", {"solver": "best"}),
        ("2:4", {"solver": s3.MatchVariance(s3.Wanda())}),
    ],
    ids=str,
)
def test_so_do_their_ways_of_cutting_and_of_going_on(text, options):
    same_wherever_the_default_is(*layer()[:1], text, layer()[1], **options)


@pytest.mark.parametrize("text", ["2:4", "1:2@2x4"])
def test_so_does_local_search(text):
    same_wherever_the_default_is(*layer()[:1], text, layer()[1], "magnitude", refine=True)


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt", "sobs", "admm"])
def test_so_do_couplings(solver):
    (W, H), shapes = layer(), "down: (M,1) & up: (1,K) keep 50%"
    same_wherever_the_default_is({"down": W, "up": W.T.contiguous()}, shapes, {"down": H, "up": H[:16, :16]}, solver)
