"""OWL: layers with more outliers keep more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from s3lab.errors import SpecError
from s3lab.models.prune.moments import read_moments
from s3lab.models.search.ladder import Ladder


def aim_by_outliers(
    ladders: Sequence[Ladder], moments: Sequence[Path], target: float, threshold: float = 5.0, spread: float = 0.08
) -> list[float]:
    """Return the sparsity of each ladder, all matrices of a decoder layer alike.

    Dₗ is the share of a layer's weights with |W_ij|·‖X_j‖ above ``threshold`` times their mean over the matrix, and
    Sₗ = S + spread − 2·spread·(Dₗ − min D) / (max D − min D), moved so that the mean over the cost is S = 1 − target.

    Source: L. Yin et al., *Outlier Weighed Layerwise Sparsity (OWL)*, ICML 2024, arXiv 2310.05175; there of shares of
    weights, here of whatever the cost is.  Raises SpecError where a layer would keep all or nothing.
    """
    outliers: dict[int, list[int]] = {}
    for layer in {ladder.layer for ladder in ladders}:
        power = {
            name: measured.H.diagonal()
            for names, measured in read_moments(moments[layer]).items()
            if measured.H is not None
            for name in names
        }
        own = {n: W for ladder in ladders if ladder.layer == layer for n, W in ladder.weights.items() if n in power}
        scores = [W.float().abs() * power[name].float().sqrt().to(W.device) for name, W in own.items()]
        outliers[layer] = [
            sum(int((score > threshold * score.mean()).sum()) for score in scores),
            sum(score.numel() for score in scores),
        ]
    share = torch.tensor([outliers[ladder.layer][0] / max(outliers[ladder.layer][1], 1) for ladder in ladders])
    size = torch.tensor([ladder.rungs[-1].cost for ladder in ladders], dtype=torch.float64)
    extent = share.max() - share.min()
    place = (share - share.min()) / extent if extent else torch.zeros_like(share)
    offset = -2 * spread * place.double()
    sparsity = 1 - target + offset - (offset * size).sum() / size.sum()
    if not bool(((sparsity > 0) & (sparsity < 1)).all()):
        raise SpecError(f"OWL with spread {spread} keeps all or nothing of a layer at {target:.4g}: lower the spread")
    return sparsity.tolist()
