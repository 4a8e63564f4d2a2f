"""A pruned layer -> Figure: its weight before and after, its mask, and what each output row has lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from s3lab.lab.draw.style import COLOURS, INK, PAGE, style

if TYPE_CHECKING:
    from torch import Tensor

_ROWS, _COLUMNS = 48, 64


def draw_portrait(before: Tensor, after: Tensor, mask: Tensor, row_error: Tensor, *, title: str = "") -> Figure:
    """Draw the corner of a weight (M, K) before and after, where it is kept, and the error of each of the M rows.

    ``row_error`` (M,) is relative, as of `measure_rows`; rows stand in the order of their errors.
    """
    corner = [x[:_ROWS, :_COLUMNS].detach().cpu().float().numpy() for x in (before, after, mask)]
    most = float(np.abs(np.stack(corner[:2])).max())
    with style({"axes.grid": False}):
        fig = Figure(figsize=(PAGE, 3.6), layout="constrained")
        parts: Any = fig.subfigures(2, 1, height_ratios=[1.7, 1])
        top, bottom = parts
        axes = top.subplots(1, 3, sharey=True)
        for ax, name, values in zip(axes, ("weight before", "weight after", "kept"), corner, strict=True):
            if name == "kept":
                ax.imshow(values, cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
            else:
                seen = ax.imshow(values, cmap="PuOr", vmin=-most, vmax=most, interpolation="nearest")
            ax.set(title=name, xlabel="input")
        axes[0].set_ylabel("output")
        top.colorbar(seen, ax=axes[:2], label="weight", pad=0.02)
        ax = bottom.subplots()
        ordered = 100 * row_error.detach().cpu().float().sort(descending=True).values.numpy()
        ax.fill_between(np.arange(len(ordered)), ordered, step="mid", color=COLOURS[3], edgecolor=INK, linewidth=0.4)
        ax.set(xlabel="output rows, worst first", ylabel="error (%)", xlim=(0, len(ordered) - 1), ylim=(0, None))
        ax.grid(True, axis="y")
        fig.suptitle(title, fontsize=8)
    return fig


def measure_rows(before: Tensor, after: Tensor, H: Tensor) -> Tensor:
    """Return the relative output error of each row, ‖X(ŵ−w)‖ / ‖Xw‖ = √((ŵ−w)H(ŵ−w)ᵀ / wHwᵀ), (M,); of a row that gives
    nothing, 0.

    >>> import torch
    >>> measure_rows(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]]), torch.eye(2))
    tensor([0.6000])
    """
    lost, all_ = (((x @ H) * x).sum(1).clamp(min=0) for x in (after.to(before.dtype) - before, before))
    return (lost / all_.where(all_ > 0, 1)).sqrt()
