"""Budgets by error: what each matrix loses of its own output."""

from __future__ import annotations

from collections.abc import Sequence


def weigh_errors(errors: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> list[list[float]]:
    """Return the loss of each rung of each ladder: the square of its relative output error, times the ladder's weight.

    ‖X(Ŵ−W)ᵀ‖² / ‖XWᵀ‖²: without weights, equal shares of any matrix's output energy count alike.

    >>> weigh_errors([[0.5, 0.0]], [2.0])
    [[0.5, 0.0]]
    """
    weights = [1.0] * len(errors) if weights is None else weights
    return [[weight * error**2 for error in curve] for weight, curve in zip(weights, errors, strict=True)]
