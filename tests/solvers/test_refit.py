"""The fit of kept weights: where it stops, what it leaves alone, and its bound on what it can still gain."""

import pytest
import torch

import s3lab as s3
from s3lab.solvers import refit


def problem_of(seed=0, M=4, K=16, dtype=torch.float64, damp=1e-2):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(3 * K, K, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(K, K, generator=generator, dtype=torch.float64)
    W = torch.randn(M, K, generator=generator, dtype=torch.float64)
    return s3.Problem(W.to(dtype), (X.T @ X / len(X)).to(dtype), damp=damp)


def least(problem, mask):
    """The best weights, by an explicit solution of each row's normal equations in float64."""
    W, H = problem.weight.double(), problem.hessian.double()
    fit = torch.zeros_like(W)
    for i, kept in enumerate(mask):
        fit[i, kept] = torch.linalg.solve(H[kept][:, kept], (W[i] @ H)[kept])
    return fit


def mask_of(problem):
    return s3.parse("2:4").bind(problem.shape).project(problem.weight.abs())


def square(apart, H):
    return float(((apart @ H) * apart).sum())


def test_it_stops_where_nothing_gains_any_more():
    """After the twenty-first step in a row that has not taken a tenth off the least residual so far."""
    U = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    flat = (U * torch.logspace(0, -12, 96, dtype=torch.float64)) @ U.T
    problem = s3.Problem(problem_of(M=2, K=96).W, (flat + flat.T) / 2, damp=1e-14)
    mask = mask_of(problem)
    fit = s3.Refit(tolerance=1e-9)(problem, mask)
    history = [s3.Refit(tolerance=1e-9, max_steps=steps)(problem, mask).residual for steps in range(1, fit.steps + 1)]
    W, H = problem.weight, problem.hessian
    start = ((W * ~mask) @ H * mask).norm(dim=1) / (W @ H).norm(dim=1)
    least, last = float(start.max()), 0
    for step, residual in enumerate(history, 1):
        if residual < 0.9 * least:
            least, last = residual, step
        assert step - last <= 20 or step == fit.steps
    assert fit.steps == last + 21 < 400 and fit.residual > 1e-9


def test_the_residual_is_that_of_the_weights_it_returns():
    problem = problem_of()
    W, H, mask = problem.weight, problem.hessian, mask_of(problem)
    for steps in (1, 2, 5):
        fit = s3.Refit(max_steps=steps)(problem, mask)
        left = (((W - fit.weight) @ H) * mask).norm(dim=1) / (W @ H).norm(dim=1)
        assert fit.steps == steps and fit.residual == pytest.approx(float(left.max()), rel=1e-6)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_a_tolerance_is_met_and_not_by_far(tolerance):
    problem = problem_of()
    fit = s3.Refit(tolerance=tolerance)(problem, mask_of(problem))
    assert fit.residual <= tolerance < s3.Refit(max_steps=fit.steps - 1)(problem, mask_of(problem)).residual
    assert s3.Refit(tolerance=tolerance)(problem, mask_of(problem), start=fit.weight).steps == 0


def test_single_precision_is_within_a_hundred_thousandth_of_the_least_loss():
    problem = problem_of(dtype=torch.float32)
    mask, H = mask_of(problem), problem.hessian.double()
    fit = s3.Refit()(problem, mask)
    best = square(problem.weight.double() - least(problem, mask), H)
    assert best * (1 - 1e-5) <= square(problem.weight.double() - fit.weight.double(), H) <= best * (1 + 1e-5)
    assert 1e-6 < fit.residual <= 3e-4


def test_rows_without_weights_or_support_stay_zero_and_let_the_others_end():
    problem = problem_of()
    W, mask = problem.W.clone(), mask_of(problem)
    W[1], mask[2] = 0, False
    apart = s3.Problem(W, problem.H)
    fit = s3.Refit()(apart, mask)
    assert not fit.weight[1:3].any() and fit.residual <= 1e-12
    torch.testing.assert_close(fit.weight, least(apart, mask), rtol=1e-8, atol=1e-10)
    nothing = s3.Refit()(s3.Problem(torch.zeros_like(W), problem.H), mask)
    assert nothing.steps == 0 and not nothing.weight.any() and nothing.residual == 0


def radau(A, b, least, steps):
    """The bounds on bᵀ(A⁻¹ − …)b after each step, from the matrices of Lanczos: the last entry of each is changed so
    that ``least`` is an eigenvalue of it."""
    basis, bounds = [b / b.norm()], []
    for k in range(steps):
        Q = torch.stack(basis)
        T = Q @ A @ Q.T
        rest = A @ basis[-1] - Q.T @ (Q @ A @ basis[-1])
        rest -= Q.T @ (Q @ rest)
        inner, beta = T[:k, :k], T[k - 1, k] if k else 0.0
        last = torch.eye(len(T), dtype=A.dtype)[-1]
        shifted = torch.linalg.inv(inner - least * torch.eye(k, dtype=A.dtype))
        changed = T + (least + (beta**2 * shifted[-1, -1] if k else 0.0) - T[k, k]) * torch.outer(last, last)
        bounds.append(float(b @ b * (torch.linalg.inv(changed)[0, 0] - (torch.linalg.inv(inner)[0, 0] if k else 0.0))))
        basis.append(rest / rest.norm())
    return bounds


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("damp", [1e-2, 1e-1])
def test_the_bound_on_what_is_ahead_is_that_of_gauss_radau_and_holds(monkeypatch, seed, damp):
    """What is ahead is e², the fall of the damped loss of each row down to its least."""
    problem = problem_of(seed, damp=damp)
    W, mask, H = problem.weight, mask_of(problem), problem.hessian
    end, seen = least(problem, mask), []

    class Watched(refit._Outlook):
        def is_hopeless(self, W_hat, product):
            seen.append((self.loss, (self.reach * product)[:, 0].tolist(), W_hat.clone()))
            return super().is_hopeless(W_hat, product)

    monkeypatch.setattr(refit, "_Outlook", Watched)
    s3.Refit(tolerance=1e-4)(problem, mask, below=1e9)
    expected = []
    for w, kept in zip(W, mask, strict=True):
        root = H.diagonal()[kept].sqrt()
        slope = ((w * ~kept) @ H)[kept] / root
        lowest = float(damp * problem.H.diagonal().mean() / H.diagonal().max())
        expected.append(radau(H[kept][:, kept] / root / root[:, None], slope, lowest, 5))
    for step, (loss, ahead, W_hat) in enumerate(seen[:5]):
        assert loss == pytest.approx(square(W - W_hat, H), rel=1e-9)
        assert ahead == pytest.approx([bounds[step] for bounds in expected], rel=1e-6)
        assert (((W_hat - end) @ H * (W_hat - end)).sum(1) <= torch.tensor(ahead) * (1 + 1e-9)).all()
    assert len(seen) >= 5


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_is_given_up_as_soon_as_its_bounds_say_so(monkeypatch, seed):
    """Below the undamped loss of the best fit: |√loss − √best| and |√ridge − √its own| are at most e each."""
    problem = problem_of(seed)
    mask, H = mask_of(problem), problem.hessian
    undamped = problem.loss(least(problem, mask), mask)
    seen = []

    class Watched(refit._Outlook):
        def is_hopeless(self, W, product):
            apart = problem.weight - W
            added = self.problem.ridge * float(apart.square().sum())
            ahead = float((self.reach * product).sum())
            loss = square(apart, H) - added
            surely = max(loss - 2 * ahead - 2 * (added * ahead) ** 0.5, max(loss**0.5 - ahead**0.5, 0) ** 2)
            assert surely <= undamped * (1 + 1e-9)
            seen.append(super().is_hopeless(W, product))
            assert seen[-1] == (surely > self.below * 1.001)
            return seen[-1]

    monkeypatch.setattr(refit, "_Outlook", Watched)
    for below in (0.1, 0.5, 0.9, 0.98):
        seen.clear()
        fit = s3.Refit()(problem, mask, below=below * undamped)
        assert seen[-1] and not any(seen[:-1]) and fit.steps == len(seen) - 1
    assert s3.Refit()(problem, mask, below=undamped * 0.9995).residual <= 1e-12


def test_without_damping_nothing_bounds_what_is_ahead_and_no_fit_is_given_up():
    problem = problem_of(damp=0.0)
    mask = mask_of(problem)
    fit, tried = s3.Refit()(problem, mask), s3.Refit()(problem, mask, below=1e-6)
    assert torch.equal(tried.weight, fit.weight) and tried.residual <= 1e-12


def test_what_cannot_be_is_told():
    problem = problem_of()
    with pytest.raises(s3.SolveError, match=r"max_steps=0.*at least 1 and tolerance, if given, above 0"):
        s3.Refit(max_steps=0)
    with pytest.raises(s3.SolveError, match="tolerance"):
        s3.Refit(tolerance=0.0)
    with pytest.raises(s3.ShapeError, match=r"a mask of shape \(4, 8\) for a weight of shape \(4, 16\)"):
        s3.Refit()(problem, torch.ones(4, 8, dtype=torch.bool))
