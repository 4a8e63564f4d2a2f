"""The parts of wrapped matrices in one table of tensors, as files hold them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from s3lab.solvers.wrap import Wrapped

_PARTS = "left", "core", "right"


def name_parts(wrapped: Mapping[str, Wrapped]) -> dict[str, Tensor]:
    """Return ``NAME.left``, ``NAME.core`` and ``NAME.right`` of each matrix.

    >>> import torch
    >>> one = torch.ones(1, 1, 1)
    >>> table = name_parts({"up_proj": Wrapped(one, one[0], one, one[0] != 0)})
    >>> list(table), list(find_parts(table))
    (['up_proj.left', 'up_proj.core', 'up_proj.right'], ['up_proj'])
    """
    return {f"{name}.{part}": getattr(found, part) for name, found in wrapped.items() for part in _PARTS}


def find_parts(tensors: Mapping[str, Tensor]) -> dict[str, Wrapped]:
    """Return the matrices that have all their parts in a table of tensors."""
    found = {}
    for name in (key.removesuffix(".core") for key in tensors if key.endswith(".core")):
        if all(f"{name}.{part}" in tensors for part in _PARTS):
            left, core, right = (tensors[f"{name}.{part}"] for part in _PARTS)
            found[name] = Wrapped(left, core, right, core != 0)
    return found
