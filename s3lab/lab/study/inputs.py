"""Patterns, criteria and corrections on the inputs of a model's layers: the perplexity of every combination."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pandas import DataFrame
from torch import Tensor

from s3lab.errors import DataError
from s3lab.lab.study.interval import find_interval
from s3lab.models.inputs.activations import Activation
from s3lab.models.inputs.calibrate import Learning, sparsify
from s3lab.models.text.reference import perplexity
from s3lab.shapes import Integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = "none"


def compare_inputs(
    model: PreTrainedModel,
    calibration: Integer[Tensor, "N L"],
    test: Integer[Tensor, "n L"],
    patterns: Sequence[str],
    criteria: Sequence[str],
    corrections: Mapping[str, Mapping[str, Any]],
    learning: Learning | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each pattern, criterion and correction on all layers: perplexity, and its loss and gain.

    ``corrections`` are options of `Activation` by name.  ``loss_percent`` is what the perplexity is above the dense
    model's, ``gain_percent`` what it is below that of the correction "none" on the same tokens, missing without it.
    The model is as it was after each row.
    """
    dense = perplexity(model, test)
    for pattern in patterns:
        for criterion in criteria:
            plain = float("nan")
            for name, options in sorted(corrections.items(), key=lambda item: item[0] != PLAIN):
                chosen = Activation(pattern, criterion, **options)  # type: ignore[arg-type]
                with sparsify(model, chosen, calibration=calibration, learning=learning):
                    found = perplexity(model, test)
                plain = found if name == PLAIN else plain
                yield {
                    "pattern": pattern,
                    "criterion": criterion,
                    "correction": name,
                    "perplexity": found,
                    "dense_perplexity": dense,
                    "loss_percent": 100 * (found / dense - 1),
                    "gain_percent": 100 * (1 - found / plain),
                }


def find_gains(rows: DataFrame, by: Sequence[str], value: str = "gain_percent", level: float = 0.95) -> DataFrame:
    """Return for each group the mean of a column over its rows, one a seed, and its interval's ends and half width.

    Raises DataError if the table lacks a column, or has a group of one row.

    >>> find_gains(DataFrame({"correction": ["VAR"] * 3, "gain_percent": [1.0, 2.0, 3.0]}), ["correction"]).round(2)
      correction  gain_percent  half_width   low  high  rows
    0        VAR           2.0        2.48 -0.48  4.48     3
    """
    if missing := [name for name in (*by, value) if name not in rows.columns]:
        raise DataError(f"the table has no column {', '.join(missing)}: it has {', '.join(rows.columns)}")
    found = []
    for _, group in rows.groupby(list(by), sort=False):
        mean, half = find_interval(group[value].tolist(), level)
        ends = {value: mean, "half_width": half, "low": mean - half, "high": mean + half, "rows": len(group)}
        found.append({**group[list(by)].iloc[0].to_dict(), **ends})
    return DataFrame(found)
