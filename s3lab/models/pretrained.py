"""A language model and its tokenizer by name: one that ships with the package, a folder, or the hub's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from s3lab.errors import DataError
from s3lab.models.reference import REFERENCE_DIR

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHIPPED = ("reference", "small", "tiny")


def load_model(
    name: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to evaluate, on ``device``.

    ``name`` is "reference", "small" or "tiny" for those that ship with the package, a folder as ``save_pretrained``
    leaves it, or a model of the Hugging Face hub; ``dtype`` "auto" is the one it was saved in.  Weights come from
    safetensors only and no code comes with them.  DataError if the model cannot be had, or lacks weights.

    >>> model, tokenizer = load_model("reference")
    >>> model.dtype, tokenizer.decode(tokenizer.encode("with open"))
    (torch.bfloat16, 'with open')
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = REFERENCE_DIR.parent / name if name in SHIPPED else Path(name)
    source, local = (str(place), True) if place.is_dir() else (str(name), False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        model, loaded = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            source,
            dtype=dtype,
            local_files_only=local,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        bare = local and not (place / "config.json").exists()
        reason = "there is no config.json in it" if bare else " ".join(str(error).split())
        raise DataError(
            f"no model can be loaded from {str(name)!r} ({reason}): without a network, "
            "give the folder of a saved model, or 'reference' for the one that ships with s3lab"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise DataError(
            f"{str(name)!r} lacks {len(missing)} weights of its model, {missing[0]} among them, and would run on "
            "random ones: save it again with save_pretrained"
        )
    return model.to(device).eval(), tokenizer
