"""What `prune` and every solver put together: which option reaches which step, and what a solution says of them."""

from dataclasses import dataclass

import pytest
import torch

import s3lab as s3
from s3lab import solvers
from s3lab.solvers import base
from s3lab.solvers.base import ScoreSolver
from s3lab.tensors.meter import Meter
from s3lab.tensors.processes import ProcessGroup

PAIR = "a: (1,1) | b: (1,1) keep 50%"


def layer(M=6, K=8, tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, K, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(K, K, generator=generator, dtype=torch.float64)
    return torch.randn(M, K, generator=generator, dtype=torch.float64), X.T @ X / tokens


def best_fit(W, H, mask):
    """The least loss on a support, by least squares on a square root of H, row by row."""
    root, fit = torch.linalg.cholesky(H).T, torch.zeros_like(W)
    for i, support in enumerate(mask):
        fit[i, support] = torch.linalg.lstsq(root[:, support], root @ W[i]).solution
    return fit


def relative(W_hat, W, H):
    return float((((W_hat - W) @ H * (W_hat - W)).sum() / ((W @ H) * W).sum()).sqrt())


@pytest.fixture
def _seconds(monkeypatch):
    """Every piece of work that is measured takes one second and two MiB."""

    class Clock(Meter):
        def __exit__(self, *error):
            self.time_s, self.mem_mib = 1.0, 2.0

    for module in (solvers, base):
        monkeypatch.setattr(module, "Meter", Clock)


@pytest.mark.usefixtures("_seconds")
def test_the_time_is_that_of_all_steps():
    W, H = layer()
    for options, seconds in (({}, 1), ({"refit": True}, 2), ({"refine": True}, 2)):
        found = s3.prune(W, "2:4", H, "wanda", **options)
        assert (found.stats["time_s"], found.stats["mem_mib"]) == (seconds, 2)
    assert s3.prune(W, "2:4", H, "wanda", H_test=H, damp="auto", refit=True).stats["time_s"] == 1


@pytest.mark.usefixtures("_seconds")
def test_a_solution_tells_its_pattern_its_solver_and_its_figures():
    W = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    found = s3.prune(W, "2:4", torch.eye(4), "magnitude")
    told = "Solution('2:4', Magnitude(), shape=(1, 4), error=0.4082, time_s=1, mem_mib=2, damp=0.01)"
    assert repr(found) == told
    assert told.replace("'", "&#x27;") in found._repr_html_() or told in found._repr_html_()
    bare = s3.prune(W, "2:4", solver="magnitude")
    assert repr(bare) == "Solution('2:4', Magnitude(), shape=(1, 4), time_s=1, mem_mib=2)"
    coupled = s3.prune({"a": W, "b": W}, PAIR, {"a": torch.eye(4), "b": torch.eye(4)}, "obd")
    assert coupled["a"]._repr_html_() is None and coupled["b"].solver == "OBD()"


def test_the_defaults_are_the_best_solver_at_a_hundredth():
    W, H = layer()
    found = s3.prune(W, "2:4", H)
    assert found.stats["damp"] == 0.01 and found.stats["support"] and "processes" not in found.stats
    assert "Refine" not in found.solver and "Refit" not in found.solver


def test_errors_are_those_of_both_moments_by_name():
    W, H = layer()
    other, H_test = layer(seed=1)
    found = s3.prune(W, "2:4", H, "sparsegpt", H_test=H_test)
    assert found.error == pytest.approx(relative(found.weight, W, H))
    assert found.error_test == pytest.approx(relative(found.weight, W, H_test))
    pair = s3.prune({"a": W, "b": other}, PAIR, {"a": H, "b": H_test}, "obd", H_test={"b": H})
    assert pair["a"].error == pytest.approx(relative(pair["a"].weight, W, H)) and pair["a"].error_test is None
    assert pair["b"].error == pytest.approx(relative(pair["b"].weight, other, H_test))
    assert pair["b"].error_test == pytest.approx(relative(pair["b"].weight, other, H))


@dataclass(frozen=True)
class Stumbling(ScoreSolver):
    """Magnitude, which fails as a factorisation does until the damping is a tenth."""

    def score(self, problem):
        if problem.damp < 0.1:
            raise torch.linalg.LinAlgError("a pivot is not positive")
        return problem.weight.abs()


@pytest.mark.parametrize("options", [{"refit": True}, {"refine": s3.Refine(sweeps=1)}, {"refine": True}], ids=str)
def test_weights_are_refitted_at_the_damping_that_was_used(options):
    W, H = layer()
    found, plain = s3.prune(W, "2:4", H, Stumbling(), **options), s3.prune(W, "2:4", H, Stumbling())
    assert found.stats["damp"] == plain.stats["damp"] == 0.1
    damped = H + 0.1 * H.diagonal().mean() * torch.eye(8, dtype=H.dtype)
    torch.testing.assert_close(found.weight, best_fit(W, damped, found.mask), rtol=1e-7, atol=1e-9)
    if "refit" in options:
        assert torch.equal(found.mask, plain.mask) and found.solver.startswith("Stumbling() + Refit(")
    else:
        assert found.error < s3.prune(W, "2:4", H, Stumbling(), refit=True).error
        assert options["refine"] is True or found.stats["sweeps"] == 1
        assert found.solver == f"Stumbling() + {s3.Refine() if options['refine'] is True else options['refine']}"


@pytest.mark.parametrize("refit", [False, True])
def test_a_coupling_is_damped_until_its_leader_can_be_solved(refit):
    (W, H), (up, _) = layer(), layer(8, 5)
    text = "down: (M,1) & up: (1,K) follows keep 50%"
    found = s3.prune({"down": W, "up": up}, text, {"down": H}, Stumbling(), refit=refit)
    assert found["down"].stats["damp"] == 0.1 and found["up"].error is None
    damped = H + 0.1 * H.diagonal().mean() * torch.eye(8, dtype=H.dtype)
    expected = best_fit(W, damped, found["down"].mask) if refit else W * found["down"].mask
    torch.testing.assert_close(found["down"].weight, expected, rtol=1e-7, atol=1e-9)


def test_a_solver_is_called_on_one_problem_or_on_several():
    (W, H), (V, G) = layer(), layer(seed=1)
    one, pair = s3.parse("2:4"), s3.parse(PAIR)
    problems = {"a": s3.Problem(W, H), "b": s3.Problem(V, G)}
    assert torch.equal(s3.OBD()(problems["a"], one).weight, s3.prune(W, one, H, "obd").weight)
    found, same = s3.OBD()(problems, pair), s3.prune({"a": W, "b": V}, pair, {"a": H, "b": G}, "obd")
    assert all(torch.equal(found[name].weight, same[name].weight) for name in ("a", "b"))
    with pytest.raises(s3.SpecError, match="is for several tensors by name"):
        s3.OBD()(problems["a"], pair)
    with pytest.raises(s3.SpecError, match="2:4 is for one tensor"):
        s3.OBD()(problems, one)


def test_the_salient_blocks_are_those_of_the_score_that_is_named():
    W, H = layer(K=16)
    salient = s3.prune(W, "1:8", H, "magnitude").mask
    found = s3.prune(W, "2:4 plus 1:8", H, "sparsegpt", salient="magnitude")
    assert found.mask[salient].all() and found.solver == f"{s3.SparseGPT()}, salient by Magnitude()"
    own = s3.prune(W, "2:4 plus 1:8", H, "sparsegpt")
    assert not torch.equal(own.mask, found.mask) and own.solver == f"{s3.SparseGPT()}"


def test_what_each_process_finds_in_whole_is_what_the_first_one_found():
    class Second(ProcessGroup):
        """The second of two, the first of which has found the same upside down."""

        rank, size = 1, 2

        def first(self, x):
            return x.flip(0)

    W, H = layer()
    alone, told = s3.prune(W, "50%", H, "obd"), s3.prune(W, "50%", H, "obd", distributed=Second())
    assert torch.equal(told.mask, alone.mask.flip(0)) and torch.equal(told.weight, alone.weight.flip(0))
    assert told.stats["processes"] == 1 and told.stats["damp"] == alone.stats["damp"]
