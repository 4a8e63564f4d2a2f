"""What a method costs and brings on a layer: error, time, memory, and how near its time is to the machine's limit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from s3lab.errors import DataError
from s3lab.models.measure.layers import Layer
from s3lab.solvers import ADMM, prune
from s3lab.tensors.hessian import output_error
from s3lab.tensors.meter import Meter

if TYPE_CHECKING:
    from pandas import DataFrame

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"solver": "magnitude"},
    "wanda": {"solver": "wanda"},
    "obd": {"solver": "obd"},
    "sparsegpt": {"solver": "sparsegpt"},
    "sparsegpt + refit": {"solver": "sparsegpt", "refit": True},
    "sobs": {"solver": "sobs"},
    "sobs + refine": {"solver": "sobs", "refine": True},
    "admm quick": {"solver": ADMM(effort="quick")},
    "admm": {"solver": "admm"},
    "admm thorough": {"solver": ADMM(effort="thorough")},
    "admm + refine": {"solver": "admm", "refine": True},
}


def make_methods(layer: Layer, pattern: str, names: Sequence[str], damp: float) -> dict[str, Callable[[], Tensor]]:
    """Return methods of `METHODS` by name, ready to prune a layer; DataError for an unknown name."""
    if unknown := [name for name in names if name not in METHODS]:
        raise DataError(f"no method is called {', '.join(unknown)}: there are {', '.join(METHODS)}")

    def make(options: dict[str, Any]) -> Callable[[], Tensor]:
        return lambda: prune(layer.W, pattern, layer.H, damp=damp, **options).weight

    return {name: make(METHODS[name]) for name in names}


def measure(
    methods: dict[str, Callable[[], Tensor]], layer: Layer, repeats: int = 1, *, count: bool = True
) -> list[dict[str, Any]]:
    """Return a row per method: errors, seconds (median, and 20 and 80 % of them), peak memory, and GFLOP of products.

    A method gives the pruned weight (M, K).  Methods take turns, so that a busy machine weighs on all of them alike;
    with ``count`` the operations of its matrix products are counted in one more call, that is not timed.
    """
    runs: dict[str, list[Meter]] = {name: [] for name in methods}
    pruned: dict[str, Tensor] = {}
    for _ in range(repeats):
        for name, method in methods.items():
            with Meter(layer.W.device) as meter:
                pruned[name] = method()
            runs[name].append(meter)
    return [
        {
            "layer": layer.name,
            "M": layer.W.shape[0],
            "K": layer.W.shape[1],
            "tokens": layer.tokens,
            "method": name,
            "error": output_error(pruned[name], layer.W, layer.H),
            "error_test": output_error(pruned[name], layer.W, layer.H_test),
            **_spread([run.time_s for run in runs[name]]),
            "mem_mib": median([run.mem_mib for run in runs[name] if run.mem_mib is not None] or [float("nan")]),
            "product_gflop": _count(method) if count else None,
            "repeats": repeats,
        }
        for name, method in methods.items()
    ]


def measure_peak(device: str = "cpu", size: int = 2048, repeats: int = 5) -> float:
    """Return the GFLOP/s of the machine's float32 matrix product, the best of some."""
    A = torch.randn(size, size, device=device)
    times = []
    for _ in range(repeats + 1):
        with Meter(device) as meter:
            torch.mm(A, A)
        times.append(meter.time_s)
    return 2e-9 * size**3 / min(times[1:])


def mark_frontier(df: DataFrame, cost: str, loss: str, by: Sequence[str]) -> DataFrame:
    """Return the table with a column ``frontier``: whether no row of its group is both cheaper and better.

    >>> from pandas import DataFrame
    >>> table = DataFrame({"group": "a", "time": [1, 2, 3], "error": [5, 6, 4]})
    >>> mark_frontier(table, "time", "error", ["group"])["frontier"].tolist()
    [True, False, True]
    """
    ordered = df.sort_values([*by, cost, loss]).astype({loss: float})
    least_before = ordered.groupby(list(by))[loss].transform(lambda values: values.cummin().shift(fill_value=np.inf))
    return df.assign(frontier=ordered[loss] < least_before)


def fit_exponent(df: DataFrame, x: str, y: str) -> float:
    """Return the p of y ≈ c·x^p by least squares on logarithms; DataError with fewer than two values of x."""
    if (values := len(df[x].unique())) < 2:
        raise DataError(f"an exponent over {x} needs two values of it, and the table has {values}")
    return float(np.polyfit(np.log(df[x].to_numpy(dtype=float)), np.log(df[y].to_numpy(dtype=float)), 1)[0])


def _spread(times: list[float]) -> dict[str, float]:
    fifths = quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return {"time_s": median(times), "time_20_s": fifths[0], "time_80_s": fifths[3]}


def _count(method: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        method()
    return counter.get_total_flops() / 1e9
