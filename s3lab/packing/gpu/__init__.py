"""Products with a packed weight on a GPU: which kernel takes how many tokens, and why none does."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import linear

from s3lab.errors import SpecError
from s3lab.packing.codec import ALONE, Packed
from s3lab.packing.decode import TOKENS
from s3lab.packing.gpu.fragments import Fragments
from s3lab.packing.hardware import to_semi_structured
from s3lab.packing.rows import Rows

BATCH = 64  # tokens that follow no other, up to which it is the weight's bytes that take the time
_HALF = torch.float16, torch.bfloat16
_SPARSE_CORES = 8, 9  # major versions of devices for which torch has a product with 2:4

Form = Fragments | Tensor


def is_gpu(device: torch.device) -> bool:
    """Return whether kernels of a GPU run on a device: on a CPU they do in Triton's interpreter."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def find_form(packed: Packed) -> Form | None:
    """Return a weight as tensor cores take it packed, None where there is no such form of it.

    2:4 is torch's semi-structured tensor, rows in pairs are `Fragments`; either of float16 or bfloat16.
    """
    (values,) = packed.values.values()
    if values.dtype not in _HALF or values.kind != "same" or packed.pattern.names:
        return None
    device = values.data.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in _SPARSE_CORES:
        try:
            kept, indices = to_semi_structured(packed)
        except SpecError:
            pass
        else:
            from torch.sparse import SparseSemiStructuredTensorCUTLASS

            shape = torch.Size(packed.shapes[ALONE])
            return SparseSemiStructuredTensorCUTLASS(shape, kept, indices.to(device), None, None, None)
    return Fragments.of(packed.places[ALONE], values)


def reason(rows: Rows) -> str:
    """Return why no kernel multiplies these rows on a GPU, empty where one does."""
    if rows.values.kind != "same" or rows.values.dtype not in (torch.float32, *_HALF):
        return "no kernel for " + (rows.values.kind if rows.values.kind != "same" else str(rows.values.dtype))
    return "" if find_spec("triton") else "Triton is not installed"


def multiply(rows: Rows, form: Form | None, x: Tensor) -> Tensor | None:
    """Return x Wᵀ (T, M) of tokens (T, K), in float32 or their dtype; None where the weight must be unpacked."""
    if reason(rows) or len(x) > (BATCH if form is not None else TOKENS):
        return None
    if len(x) <= TOKENS:
        from s3lab.packing.gpu.rows_triton import multiply_rows

        return multiply_rows(rows, x)
    if isinstance(form, Fragments):
        from s3lab.packing.gpu.fragments_triton import multiply_fragments

        return multiply_fragments(form, x)
    assert form is not None
    return linear(x, form)


def tell(rows: Rows, form: Form | None) -> str:
    """Return how products with a weight are computed, for few tokens and for more."""
    if why := reason(rows):
        return f"unpacked for each product ({why})"
    few = f"up to {TOKENS} tokens by a Triton kernel on {'single weights' if rows.runs is None else 'runs of 16'}"
    if form is None:
        return f"{few}, more unpacked"
    cores = "half the rows" if isinstance(form, Fragments) else "2:4"
    return f"{few}, up to {BATCH} by tensor cores on {cores}, more unpacked"
