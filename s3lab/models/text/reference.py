"""The reference model that ships with the package, and what a small model is loaded, measured and saved by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from s3lab.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCE_DIR = Path(__file__).parent / "weights" / "reference"
_TOKENS = 1024  # that are passed at a time to be measured
_NONE = -100  # the target of a token that has none


def load_reference(
    path: str | Path = REFERENCE_DIR, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model that ships with the package, or another of `train`, in ``dtype`` and without network.

    DataError if ``path`` holds no model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (Path(path) / "config.json").exists():
        raise DataError(f"no model in {str(path)!r}: train one there with s3lab.models.text.pretraining.train")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Save model and tokenizer in the folder ``out``, as transformers reads them, each file by rename."""
    part = out / f".{os.getpid()}.part"
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for path in part.iterdir():
        path.replace(out / path.name)
    part.rmdir()


def perplexity(model: nn.Module, ids: Tensor) -> float:
    """Return exp of the mean negative log-likelihood of all tokens but the first of each window.

    ids (N, L) int64, on any device; the model is left in the mode it was in.  Windows are passed a few at a time, as
    the logits of all their tokens are there at once.
    """
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with torch.inference_mode():
        parts = ids.split(max(1, _TOKENS // ids.shape[1]))
        losses = torch.stack([next_token_loss(model, part.to(device), "sum").double() for part in parts])
    model.train(training)
    return (losses.sum() / ids[:, 1:].numel()).exp().item()


def next_token_loss(model: nn.Module, ids: Tensor, reduction: str) -> Tensor:
    """Return the cross entropy of all tokens (N, L) but the first of each window, in float32, "mean" or "sum"."""
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()  # a copy would take as long as the loss
    targets = functional.pad(ids[:, 1:], (0, 1), value=_NONE).flatten()
    return functional.cross_entropy(logits, targets, ignore_index=_NONE, reduction=reduction)
