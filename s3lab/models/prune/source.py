"""What second moments are of: a model, and the sequences that it is calibrated on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from s3lab.errors import DataError
from s3lab.models.prune.rundir import hash_tensors
from s3lab.models.text import corpus
from s3lab.shapes import Integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_sequences(
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: str | Path | Integer[Tensor, "N L"],
    sequences: int,
    length: int,
    seed: int,
) -> Tensor:
    """Return the sequences (N, L) to calibrate on, as `prune_model` takes them."""
    if isinstance(calibration, Tensor):
        return calibration
    if tokenizer is None:
        raise DataError(f"the text of {str(calibration)!r} needs a tokenizer: give the model's, or ready sequences")
    return corpus.tokens(tokenizer, "calibration", length, sequences, seed, calibration)


def describe_source(model: PreTrainedModel, ids: Tensor, held_out: float, batch: int, seed: int) -> dict[str, Any]:
    """Return what tells second moments of a model's inputs from others: the model, and the sequences cut so."""
    config = {**model.config.to_dict(), "attention": model.config._attn_implementation}
    for key in ("_name_or_path", "transformers_version"):
        config.pop(key, None)
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "model": type(model).__name__,
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": hash_tensors(dict(model.named_parameters())),
        "calibration": hash_tensors({"ids": ids}),
        "held_out": held_out,
        "batch": batch,
        "seed": seed,
    }
