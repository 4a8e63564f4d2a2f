"""Budgets by loss: what an error of each matrix's output does to the language model's loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s3lab.models.prune.fisher import requiring
from s3lab.models.prune.moments import read_moments
from s3lab.models.search.ladder import Ladder
from s3lab.models.text.reference import next_token_loss
from s3lab.shapes import Integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_sensitivity(
    model: PreTrainedModel, ladders: Sequence[Ladder], moments: Sequence[Path], windows: Integer[Tensor, "N L"]
) -> list[float]:
    """Return the rise of the loss, in nats a token, that a relative output error of 1 of each ladder's matrices brings.

    To second order, with the Fisher matrix for the Hessian, an error δ of outputs y = Wx raises the loss by
    ½ E[(gᵀδ)²], g = ∂L/∂y.  For errors that go all ways alike that is ½ E‖g‖² E‖δ‖² / M, and of independent tokens
    E‖g‖² = ‖∂L/∂W‖² / (T · tr H), the square summed over windows of T tokens in all.  So a relative error ε costs
    ½ ‖∂L/∂W‖² tr(WHWᵀ) / (T · M · tr H) · ε².  Of a coupling, those that follow have no error, and no say.

    One forward and backward pass over the windows; gradients are those of one window at a time.
    """
    energy = {}
    for layer in {ladder.layer for ladder in ladders}:
        for names, measured in read_moments(moments[layer]).items():
            energy |= {name: measured.H.double() for name in names if measured.H is not None}
    squares = measure_gradients(model, ladders, windows)
    tokens = windows[:, 1:].numel()
    found = []
    for ladder in ladders:
        total = 0.0
        job = ladder.rungs[0].job
        for name, W in {m.name: m.weight for m in (job.leaders.values() if job else ())}.items():
            if name in energy and float(trace := energy[name].trace()):
                H, own = energy[name], W.double().cpu()
                total += 0.5 * squares[name] * float(((own @ H) * own).sum() / trace) / (tokens * len(own))
        found.append(total)
    return found


def measure_gradients(
    model: PreTrainedModel, ladders: Sequence[Ladder], windows: Integer[Tensor, "N L"]
) -> dict[str, float]:
    """Return Σ ‖∂L/∂W‖² over windows of each matrix by name, L the sum of a window's losses; the model stays as is."""
    matrices = {m.name: m for ladder in ladders for m in ladder.matrices.values()}
    parameters = {id(p): p for m in matrices.values() for p in [getattr(m.module, m.parameter)]}
    squares = dict.fromkeys(matrices, 0.0)
    with torch.enable_grad(), requiring(model, parameters.values()):
        for row in windows.to(next(model.parameters()).device).split(1):
            loss = next_token_loss(model, row, "sum")
            grads = torch.autograd.grad(loss, [*parameters.values()], allow_unused=True)
            by_id = dict(zip(parameters, grads, strict=True))
            for name, matrix in matrices.items():
                grad = by_id[id(getattr(matrix.module, matrix.parameter))]
                if grad is not None:
                    own = grad if matrix.expert is None else grad[matrix.expert]
                    squares[name] += float(own.float().square().sum())
    return squares
