"""A change of basis before a run, made on the text that the run is calibrated on and told in a line for its record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s3lab.models.basis.permute import By, permute
from s3lab.models.basis.rotate import Kind, rotate
from s3lab.models.prune.chunks import cut_chunks
from s3lab.models.prune.jobs import Specs
from s3lab.models.prune.source import find_sequences

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def rotate_and_tell(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, kind: Kind, **text: Any) -> str:
    """Rotate a model in place, and return what was done.

    ``text`` are the options by which `prune_model` draws its sequences; what it holds out is not looked at.  Raises
    what `rotate` raises.
    """
    done = rotate(model, kind, _draw(tokenizer, **text), batch=text["batch"], seed=text["seed"])
    untied = ", the head untied from the embedding" if done.untied else ""
    return f"{kind}: the residual stream, and the heads of {done.heads} of {done.layers} layers{untied}"


def permute_and_tell(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, spec: Specs, by: By, **text: Any
) -> str:
    """Permute a model in place for the spec of a run, and return what was done.

    ``text`` as in `rotate_and_tell`.  Raises what `permute` raises.
    """
    rows = permute(model, spec, by, _draw(tokenizer, **text), batch=text["batch"], seed=text["seed"])
    moved = [row for row in rows if not row["note"]]
    before, after = (sum(row[key] for row in moved) / max(1, len(moved)) for key in ("before", "after"))
    return f"{by}: {len(moved)} inputs, of which {after:.2%} is kept, and {before:.2%} was"


def _draw(
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    calibration: str | Path | Tensor,
    sequences: int,
    length: int,
    held_out: float,
    batch: int,
    seed: int,
) -> Tensor:
    """The sequences (N, L) that a run is calibrated on, without those that it holds out."""
    chunks = cut_chunks(find_sequences(tokenizer, calibration, sequences, length, seed), held_out, batch, seed)
    return torch.cat([chunk.ids for chunk in chunks if not chunk.held_out])
