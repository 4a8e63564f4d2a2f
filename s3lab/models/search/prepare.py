"""What is done to a dense model before it is pruned, in one order, told for the record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from s3lab.models.prune.flow import cut_chunks
from s3lab.models.prune.jobs import Specs
from s3lab.models.search.permute import By, permute
from s3lab.models.search.rotate import Kind, rotate
from s3lab.models.text import corpus

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def prepare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    specs: Specs,
    *,
    rotation: Kind | None = None,
    permutation: By | None = None,
    calibration: str | Path = "stdlib",
    sequences: int = 128,
    length: int = 256,
    held_out: float = 0.1,
    batch: int = 8,
    seed: int = 0,
) -> dict[str, str]:
    """Rotate a model, then permute it for ``specs``, where that is asked for, and return what was done, for a record.

    The text is what `prune_model` draws by the same options, without the share that it holds out.  Raises what `rotate`
    and `permute` raise.
    """
    if rotation is None and permutation is None:
        return {}
    ids = corpus.tokens(tokenizer, "calibration", length, sequences, seed, calibration)
    ids = torch.cat([chunk.ids for chunk in cut_chunks(ids, held_out, batch, seed) if not chunk.held_out])
    told: dict[str, str] = {}
    if rotation is not None:
        done = rotate(model, rotation, ids, batch=batch, seed=seed)
        untied = ", the head untied from the embedding" if done.untied else ""
        told["rotated"] = (
            f"{rotation}: the residual stream, and the heads of {done.heads} of {done.layers} layers{untied}"
        )
    if permutation is not None:
        rows = permute(model, specs, permutation, ids, batch=batch, seed=seed)
        moved = [row for row in rows if not row["note"]]
        before, after = (sum(row[key] for row in moved) / max(1, len(moved)) for key in ("before", "after"))
        told["permuted"] = f"{permutation}: {len(moved)} inputs, of which {after:.2%} is kept, and {before:.2%} was"
    return told
