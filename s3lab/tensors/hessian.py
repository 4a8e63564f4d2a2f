"""The second moment of a layer's inputs, streamed, and the error it measures."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor

from s3lab.errors import ShapeError
from s3lab.shapes import Float
from s3lab.tensors.processes import ProcessGroup
from s3lab.tensors.units import find_exponent, shift

_CHUNK = 16384  # tokens turned to float32 at a time, so that half-precision inputs are never copied whole
_PLAIN = 32  # inputs below 2^32 and the largest of them above 2^-32 are squared as they are
_BAND = 384  # rows of the moment computed at a time, each from its diagonal on


class Moment:
    """Running second moment XᵀX / T of batches of inputs.

    Products are taken in float32 (float64 for float64 inputs), in units of the largest input, and summed in float64, on
    the device of the first batch.  Cost: T·K² operations for a large K, and one K×K matrix.  Raises ShapeError for what
    is no batch of inputs (…, K), and for no tokens.

    >>> moment = Moment()
    >>> for batch in torch.eye(2), torch.ones(2, 2):
    ...     moment.add(batch)
    >>> moment.tokens, moment.value().tolist()
    (4, [[0.75, 0.5], [0.5, 0.75]])
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._sum: Tensor | None = None

    def add(self, X: Float[Tensor, "... K"]) -> None:
        """Add a batch of tokens; ShapeError if it is not real, not finite, or of another width than the others."""
        if X.ndim < 2 or not X.is_floating_point():
            raise ShapeError(
                f"a batch of shape {tuple(X.shape)} and {X.dtype} is no batch of inputs: expected real (..., tokens, K)"
            )
        X = X.detach().flatten(0, -2)
        if X.shape[1] == 0:
            raise ShapeError("a batch of inputs with K = 0: a layer has at least one input")
        if self._sum is None:
            self._sum = torch.zeros(X.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
        if X.shape[1] != len(self._sum):
            raise ShapeError(f"a batch of K = {X.shape[1]} inputs after batches of K = {len(self._sum)}")
        for chunk in X.split(_CHUNK):
            chunk = chunk if chunk.dtype == torch.float64 else chunk.float()
            unit = find_exponent(chunk)
            unit = unit if abs(unit) > _PLAIN else 0
            chunk = shift(chunk, -unit)
            for start in range(0, len(self._sum), _BAND):
                product = (chunk[:, start : start + _BAND].T @ chunk[:, start:]).to(self._sum)
                # what is not finite in X is not in its squares
                if not product.diagonal().isfinite().all():
                    raise ShapeError("the inputs X hold NaN or Inf: drop those tokens or compute them in float32")
                self._sum[start : start + _BAND, start:] += shift(product, 2 * unit)
        self.tokens += len(X)

    def pool(self, processes: ProcessGroup, device: torch.device) -> None:
        """Add what the other processes of a group have seen: then all hold the moment of all, with the same bits.

        All must call it, also one that has seen nothing, whose sum is then on ``device``.
        """
        self.tokens, K = (
            processes.total(self.tokens),
            int(processes.max(0.0 if self._sum is None else float(len(self._sum)))),
        )
        if K:
            own = torch.zeros(K, K, dtype=torch.float64, device=device) if self._sum is None else self._sum
            self._sum = processes.sum(own)

    def value(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "K K"]:
        """Return XᵀX / T; ShapeError if no token has been added, or the mean squares leave the range of the dtype."""
        if self._sum is None or self.tokens == 0:
            raise ShapeError("no tokens: a second moment needs at least one input vector")
        upper = (self._sum.triu() / self.tokens).to(dtype)
        H = upper + upper.triu(1).mT
        if not H.isfinite().all() or bool(((H.diagonal() == 0) != (self._sum.diagonal() == 0)).any()):
            raise ShapeError(
                f"the squares of the inputs leave the range of {dtype}: multiply all inputs by one power of two, which "
                "changes no mask, or take value(torch.float64)"
            )
        return H


def hessian(X: Float[Tensor, "... K"] | Iterable[Tensor]) -> Float[Tensor, "K K"]:
    """Return H = XᵀX / T of inputs X (T, K), or of an iterable of such batches, which is never held at once.

    H is, up to a factor 2, the Hessian of the layer's squared output error with respect to each row of its weight.
    Raises ShapeError for no tokens, NaN or Inf, or batches of different widths.

    >>> hessian(torch.tensor([[3.0, 4.0]])).tolist()
    [[9.0, 12.0], [12.0, 16.0]]
    """
    moment = Moment()
    for batch in (X,) if isinstance(X, Tensor) else X:
        moment.add(batch)
    return moment.value()


def output_error(
    W_hat: Float[Tensor, "M K"],
    W: Float[Tensor, "M K"],
    H: Float[Tensor, "K K"],
    outputs: Float[Tensor, " M"] | None = None,
) -> float:
    """Return the relative output error ‖X(Ŵ−W)ᵀ‖_F / ‖XWᵀ‖_F = √(tr ΔHΔᵀ / tr WHWᵀ), a share and not a percentage.

    The papers' measure (arXiv 2604.11315, Table 1), in float64, with the H of `hessian`, undamped; the squares of each
    output count ``outputs`` (M,) times, if given.  Raises ShapeError where the shapes do not fit.  Cost: 4·M·K²
    operations.

    >>> W = torch.tensor([[3.0, 4.0]])
    >>> output_error(torch.tensor([[0.0, 4.0]]), W, torch.eye(2))
    0.6
    """
    if W_hat.shape != W.shape or W.ndim != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ShapeError(
            f"Ŵ {tuple(W_hat.shape)}, W {tuple(W.shape)} and H {tuple(H.shape)} do not fit: expected (M, K), (M, K) "
            "and (K, K)"
        )
    W, W_hat, H = W.detach().double(), W_hat.detach().double(), H.detach().to(torch.float64, copy=True)
    unit, H = -find_exponent(W), shift(H, -find_exponent(H), out=H)
    W, change = shift(W, unit), shift(W_hat, unit) - shift(W, unit)
    if outputs is not None:
        if outputs.shape != W.shape[:1]:
            raise ShapeError(f"outputs {tuple(outputs.shape)} for W {tuple(W.shape)}: expected (M,)")
        roots = outputs.detach().double().sqrt().unsqueeze(1)
        W, change = W * roots, change * roots
    lost = float(((change @ H) * change).sum().clamp(min=0))
    return sqrt(lost / float(((W @ H) * W).sum())) if lost else 0.0
