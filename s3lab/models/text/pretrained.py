"""A language model and its tokenizer by name: one that ships or was fetched, a folder, a GGUF file, or the hub's."""

from __future__ import annotations

from pathlib import Path
from struct import error as BadStruct
from typing import TYPE_CHECKING, Any

import torch

from s3lab.errors import DataError
from s3lab.models.text.fetchable import FETCHABLE, find
from s3lab.models.text.reference import REFERENCE_DIR
from s3lab.tensors.meter import fast_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHIPPED = ("reference", "small", "tiny")


def load_model(
    name: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to evaluate, on ``device``.

    ``name`` is "reference", "small" or "tiny" for those that ship with the package, one of `FETCHABLE` that has been
    fetched, a folder as ``save_pretrained`` leaves it, a ``.gguf`` file of an architecture that transformers reads, or
    a model of the Hugging Face hub.  ``dtype`` "auto" is the one it was saved in; the quantised weights of a GGUF file
    are unpacked, to float32.  Weights come from safetensors or GGUF only and no code comes with them.  DataError if the
    model cannot be had, or lacks weights.

    >>> model, tokenizer = load_model("reference")
    >>> model.dtype, tokenizer.decode(tokenizer.encode("with open"))
    (torch.bfloat16, 'with open')
    """
    import transformers
    from safetensors import SafetensorError

    source, options = _find(name)
    unpacked = {}
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):  # older ones always unpack
        unpacked["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            source, dtype=dtype, use_safetensors=True, output_loading_info=True, **options, **unpacked
        )
    except (OSError, ValueError, LookupError, NotImplementedError, ImportError, BadStruct, SafetensorError) as error:
        bare = Path(source).is_dir() and not options.get("gguf_file") and not (Path(source) / "config.json").exists()
        reason = "there is no config.json in it" if bare else " ".join(str(error).split())
        raise DataError(
            f"no model can be loaded from {str(name)!r} ({reason}): without a network, give the folder of a saved "
            f"model, a .gguf file, or one of {', '.join((*SHIPPED, *FETCHABLE))}"
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        raise DataError(
            f"{str(name)!r} lacks {len(missing)} weights of its model, {missing[0]} among them, and would run on "
            "random ones: save it again with save_pretrained"
        )
    return model.to(device).eval(), tokenizer


def to_fast_dtype(model: PreTrainedModel, device: str | torch.device = "cpu") -> torch.dtype:
    """Turn a model of half precision to float32 if this CPU is faster in that, and return the dtype that it had.

    >>> model, _ = load_model("reference")
    >>> to_fast_dtype(model)
    torch.bfloat16
    """
    stored = model.dtype
    if (dtype := fast_dtype(stored, device)) != stored:
        to_dtype(model, dtype)
    return stored


def to_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Turn the weights of a model to another dtype, packed ones too.

    Buffers that no file holds stay as they are: rotary frequencies rounded once would be wrong for ever.

    >>> model, _ = load_model("reference")
    >>> to_dtype(model, torch.float16)
    >>> model.dtype, model.model.rotary_emb.inv_freq.dtype
    (torch.float16, torch.float32)
    """
    computed = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name in module._non_persistent_buffers_set
    ]
    torch.nn.Module.to(model, dtype)
    for module, name, buffer in computed:
        setattr(module, name, buffer)


def _find(name: str | Path) -> tuple[str, dict[str, Any]]:
    """Return what transformers is to load for a name, and by which options."""
    place = REFERENCE_DIR.parent / name if name in SHIPPED else find(str(name)) if name in FETCHABLE else Path(name)
    safe = {"trust_remote_code": False}
    if place.is_dir():
        return str(place), {**safe, "local_files_only": True}
    if place.suffix == ".gguf":
        if not place.is_file():
            raise DataError(f"there is no file {str(name)!r}: give the path of a GGUF file")
        return str(place.parent), {**safe, "local_files_only": True, "gguf_file": place.name}
    return str(name), safe
