"""One layer to prune: a weight and the second moment of its inputs, checked once, scaled once, factorised once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from s3lab.errors import ShapeError, SolveError
from s3lab.shapes import Bool, Float
from s3lab.tensors.hessian import output_error
from s3lab.tensors.processes import SOLO, ProcessGroup
from s3lab.tensors.units import find_exponent, shift

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SYMMETRY = 1e-4  # of the largest entry: float32 products of the same X differ by less
_PIVOT = 1e-10  # of its diagonal: below, an input is a sum of others to what float32 can tell
_LARGEST_DAMP = 10.0


class Units(NamedTuple):
    """The exponents of the powers of two that a weight and its second moment are measured in."""

    W: int
    H: int


PLAIN = Units(0, 0)


@dataclass(frozen=True, eq=False)
class Problem:
    """min tr (Ŵ−W) H (Ŵ−W)ᵀ over the pruned Ŵ: weight (M, K), second moment H (K, K) and, if given, a held-out one.

    ``damp`` is added to the diagonal as a fraction of its mean over live inputs.  If the factorisation still fails,
    it is raised tenfold, step by step, and ``damping`` says to what.  Inputs with a zero diagonal are dead: their
    weights count as zero.  ``outputs`` (M,) says how much the squared error of each output counts, 1 if None: then rows
    stand here times the roots of that, and are given back without them; a row that counts nothing keeps its values.
    The work is done in float64 for a float64 weight and in float32 otherwise; factorisations are in float64.  Where the
    rows are only some of a layer's, ``processes`` are the processes that hold all of them.

    ``units`` are what all but W, H and the errors is measured in: powers of two that keep squares within range, to the
    same bits whatever the scale of W and H (`measure`).  Weights below 2⁻⁷⁴ of the largest have squares of zero.

    Raises ShapeError for a weight that is no finite real matrix, for an H that is not finite, square, symmetric and of
    the weight's K, and for outputs that are not M finite numbers from 0 on; SolveError if H is needed and
    missing, or no damping makes it positive definite.

    >>> problem = Problem(torch.ones(1, 2), torch.tensor([[2.0, 0.0], [0.0, 0.0]]), damp=0.0)
    >>> problem.weight.tolist(), problem.inverse.diagonal().tolist()
    ([[1.0, 0.0]], [0.5, 0.5])
    """

    W: Float[Tensor, "M K"]
    H: Float[Tensor, "K K"] | None = None
    H_test: Float[Tensor, "K K"] | None = None
    damp: float = 1e-2
    outputs: Float[Tensor, " M"] | None = None
    processes: ProcessGroup = SOLO
    units: Units = PLAIN

    def __post_init__(self) -> None:
        _check_tensor("W", self.W)
        if self.W.ndim != 2 or self.W.numel() == 0:
            raise ShapeError(
                f"a weight of shape {tuple(self.W.shape)} and {self.W.dtype}: expected a real matrix (outputs, inputs)"
            )
        if not self.W.isfinite().all():
            raise ShapeError("the weight W holds NaN or Inf: it cannot be pruned")
        for name, H in (("H", self.H), ("H_test", self.H_test)):
            if H is not None:
                _check_moment(name, H, self.W)
        if self.outputs is not None:
            _check_outputs(self.outputs, self.W)
        if not (isinstance(self.damp, int | float) and 0 <= self.damp < inf):
            raise SolveError(f"damp = {self.damp}: the damping is a fraction of the mean diagonal, at least 0")

    @property
    def shape(self) -> tuple[int, int]:
        """(M, K)."""
        return self.W.shape[0], self.W.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the work is done in."""
        return torch.float64 if self.W.dtype == torch.float64 else torch.float32

    @cached_property
    def dead(self) -> Bool[Tensor, " K"]:
        """Inputs that were never anything but zero."""
        if self.H is None:
            return torch.zeros(self.shape[1], dtype=torch.bool, device=self.W.device)
        return self.H.detach().diagonal() == 0

    @cached_property
    def weight(self) -> Float[Tensor, "M K"]:
        """The weight in the working dtype, contiguous, its rows as they count, zero on dead inputs."""
        return shift(self.weigh(self._live), -self.units.W).to(self.dtype).contiguous()

    def weigh(self, rows: Float[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        """Return rows times the roots of ``outputs``, in float64 where there are any."""
        return rows if self.outputs is None else rows.double() * self._roots

    def restore(self, weight: Float[Tensor, "M K"], mask: Bool[Tensor, "M K"]) -> Float[Tensor, "M K"]:
        """Return a pruned weight out of the units, in the dtype of W, zero but for the ``mask``.

        What is as it was comes back to the bit, all of W where nothing is pruned.
        """
        if bool(mask.all()):
            return self.W.detach().clone()
        found = shift(weight, self.units.W)
        if self.outputs is not None:
            found = (found.double() / self._roots).to(self.dtype)
        found = torch.where(weight == self.weight, self._live, found)
        return found.masked_fill(~mask, 0).to(self.W.dtype)

    @cached_property
    def power(self) -> Float[Tensor, " K"]:
        """The mean square of each input: the diagonal of H, undamped, in the working dtype."""
        return shift(self.moment.diagonal().double(), -self.units.H).to(self.dtype)

    @cached_property
    def damping(self) -> float:
        """The damping in use, as a fraction of the mean diagonal: ``damp``, or what the factorisation needed."""
        return self._factored[0]

    @cached_property
    def hessian(self) -> Float[Tensor, "K K"]:
        """The damped H in the working dtype."""
        return self._damped(self.damping).to(self.dtype)

    @cached_property
    def inverse(self) -> Float[Tensor, "K K"]:
        """The inverse of the damped H in the working dtype."""
        return torch.cholesky_inverse(self._factored[1]).to(self.dtype).flip(0, 1)

    @cached_property
    def saliency(self) -> Float[Tensor, "M K"]:
        """What the removal of each weight alone costs, made good by all others: w² / [H⁻¹]_jj."""
        return self.weight**2 / self.inverse.diagonal()

    def divide(self, Y: Float[Tensor, "K n"]) -> Float[Tensor, "K n"]:
        """Return H⁻¹Y with the damped H, without an inverse."""
        lower = self._factored[1]
        half = solve_triangular(lower, Y.flip(0).double(), upper=False)
        return solve_triangular(lower.mT, half, upper=True).flip(0).to(Y.dtype)

    def factor(self, order: Tensor) -> Float[Tensor, "K K"]:
        """Return the upper R with H = RRᵀ of the damped H, its inputs in the given order, in the working dtype.

        That of the inputs as they come is made but once.
        """
        damp, lower = self._factored
        if bool((order.diff() < 0).any()):
            turned = order.flip(0)
            lower = torch.linalg.cholesky(self._damped(damp).index_select(0, turned).index_select(1, turned))
        return lower.to(self.dtype).flip(0, 1)

    @cached_property
    def ridge(self) -> float:
        """What the damping adds to the diagonal: no eigenvalue of the damped H is below it."""
        live = self.power[~self.dead]
        return self.damping * float(live.double().mean()) if len(live) else self.damping

    def loss(self, weight: Float[Tensor, "M K"], mask: Bool[Tensor, "M K"]) -> float:
        """Return tr (Ŵ−W)H(Ŵ−W)ᵀ with H undamped, over the rows of all the group as they count, of a weight in the
        working dtype as it is once it is given back: rounded, and zero outside the mask."""
        apart = self.weigh(shift(self.restore(weight, mask).double() - self.W.detach().double(), -self.units.W))
        moment = self.moment.to(torch.float64, copy=True)
        moment = shift(moment, -self.units.H, out=moment)
        return float(self.processes.sum(((apart @ moment) * apart).sum()))

    def error(self, W_hat: Float[Tensor, "M K"]) -> float:
        """Return the relative output error on H, undamped."""
        return output_error(W_hat, self.W, self.moment, self.outputs)

    def error_test(self, W_hat: Float[Tensor, "M K"]) -> float | None:
        """Return the relative output error on the held-out moment, None where there is none."""
        return None if self.H_test is None else output_error(W_hat, self.W, self.H_test, self.outputs)

    def damped_more(self) -> Problem:
        """Return this problem at ten times the damping; SolveError where it is beyond all reason."""
        return replace(self, damp=_raise_damping(self.damping))

    @property
    def moment(self) -> Tensor:
        """H as it was given, out of the units; SolveError where there is none."""
        if self.H is None:
            raise SolveError(
                "this solver or measure needs the second moment H of the layer's inputs: pass s3lab.hessian(X)"
            )
        return self.H.detach()

    @property
    def _roots(self) -> Tensor:
        """The roots of the outputs, (M, 1), float64."""
        assert self.outputs is not None
        return self.outputs.detach().double().sqrt().unsqueeze(1)

    @property
    def _live(self) -> Tensor:
        """The weight out of the units, in the working dtype, zero on dead inputs."""
        return self.W.detach().to(self.dtype).masked_fill(self.dead, 0)

    @cached_property
    def _factored(self) -> tuple[float, Tensor]:
        """The damping that worked and the lower factor of the damped H with its inputs turned around, float64."""
        damp = self.damp
        while True:
            H = self._damped(damp).flip(0, 1)
            factor, failed = torch.linalg.cholesky_ex(H)
            if not failed and bool((factor.diagonal() ** 2 >= _PIVOT * H.diagonal()).all()):
                return damp, factor
            damp = _raise_damping(damp)

    def _damped(self, damp: float) -> Tensor:
        H = self.moment.to(torch.float64, copy=True)
        H = shift(H, -self.units.H, out=H)
        diagonal = H.diagonal()
        live = diagonal[~self.dead]
        mean = float(live.mean()) if len(live) else 1.0
        diagonal.masked_fill_(self.dead, mean)
        diagonal += damp * mean
        return H


def measure(problems: Mapping[str, Problem]) -> dict[str, Problem]:
    """Return problems in the units of their largest weight and of their largest mean square of an input.

    Those that are solved together share their units, so that what competes is weighed alike.

    >>> W, H = torch.tensor([[3.0, 4e30]]), 1e-40 * torch.eye(2)
    >>> found = measure({"": Problem(W, H)})[""]
    >>> found.weight.abs().max().item() < 1, found.power.max().item() >= 0.5
    (True, True)
    """
    moments = [find_exponent(p.moment.diagonal()) for p in problems.values() if p.H is not None]
    units = Units(max(find_exponent(p.weigh(p.W.detach())) for p in problems.values()), max(moments, default=0))
    return {name: replace(problem, units=units) for name, problem in problems.items()}


def _raise_damping(damp: float) -> float:
    if damp >= _LARGEST_DAMP:
        raise SolveError(
            f"H is not positive definite even at damp = {damp:g}: it is no second moment of real inputs; make it with "
            "s3lab.hessian"
        )
    return min(max(10 * damp, 1e-6), _LARGEST_DAMP)


def _check_tensor(name: str, x: object) -> None:
    """Raise ShapeError for what is no dense tensor of real numbers with values."""
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} is a {type(x).__name__}: give a tensor, such as torch.as_tensor({name})")
    if x.layout != torch.strided:
        raise ShapeError(f"{name} is stored as {x.layout}: give it dense, {name}.to_dense()")
    if x.is_meta:
        raise ShapeError(f"{name} is on the meta device and has no values: load the weights first")
    if x.dtype not in _DTYPES:
        raise ShapeError(f"{name} is of {x.dtype}: expected a real matrix of {', '.join(map(str, _DTYPES))}")


def _check_outputs(outputs: Tensor, W: Tensor) -> None:
    _check_tensor("outputs", outputs)
    if outputs.shape != W.shape[:1] or outputs.device != W.device:
        raise ShapeError(
            f"outputs of shape {tuple(outputs.shape)} on {outputs.device} for a weight of M = {len(W)} outputs on "
            f"{W.device}: expected a number for each"
        )
    if not outputs.isfinite().all() or bool((outputs < 0).any()):
        raise ShapeError("outputs holds what is negative, NaN or Inf: it says how much each output counts, from 0 on")


def _check_moment(name: str, H: Tensor, W: Tensor) -> None:
    K = W.shape[1]
    _check_tensor(name, H)
    H = H.detach()
    if H.shape != (K, K):
        raise ShapeError(
            f"{name} of shape {tuple(H.shape)} and {H.dtype} for a weight of K = {K} inputs: expected real ({K}, {K})"
        )
    if H.device != W.device:
        raise ShapeError(f"{name} is on {H.device} and W on {W.device}: move one to the other")
    least, most = H.aminmax()  # NaN if any is
    if not (least.isfinite() and most.isfinite()):
        raise ShapeError(f"{name} holds NaN or Inf: compute it with s3lab.hessian from finite inputs")
    if float((H - H.T).max()) > _SYMMETRY * float(torch.maximum(-least, most)):
        raise ShapeError(f"{name} is not symmetric: expected XᵀX / T, as s3lab.hessian makes it")
    if bool((H.diagonal() < 0).any()):
        raise ShapeError(f"{name} has a negative diagonal: expected XᵀX / T, as s3lab.hessian makes it")
