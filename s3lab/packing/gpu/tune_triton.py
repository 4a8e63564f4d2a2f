"""How kernels choose their sizes: by trying them once for a shape, on disk from then on."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import triton


def tune(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], Any]:
    """Return a decorator that gives a kernel the fastest of some sizes for what its arguments of ``key`` are.

    What was found is in Triton's cache, by kernel, device and key.  In the interpreter, where time means nothing, the
    first one is taken.
    """
    own = list(configs[:1] if os.environ.get("TRITON_INTERPRET") == "1" else configs)
    return triton.autotune(own, key=list(key), cache_results=True)
