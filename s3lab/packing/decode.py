"""Products of a few tokens with a packed weight that read its packed bytes only.

A kernel in C++, `decode.cpp`, reads the bits and values row by row.  One kernel serves every pattern, as all come as
bits by rows.  A mask that keeps whole rows and columns leaves one smaller dense weight, which has no bits to read.

The truth beside it is ``linear(x, rows.unpack(…))``.  Where there is no kernel, torch multiplies by the smaller
dense weight, and for any other mask a layer unpacks, and says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from s3lab.packing.rows import Rows
from s3lab.tensors.compiled import NATIVE, build, pointer

TOKENS = 8  # as many the kernel takes
_SOURCE = Path(__file__).with_suffix(".cpp")
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_SINGLE, _HALF, _RUNS, _WHOLE = range(4)  # the layouts of the kernel
_VECTOR = 32  # a row is read in steps of so many weights
_PADDED = 64  # tokens end so, of whole rows, which are of any length


class Kernel:
    """The compiled kernel: ``level`` names the instructions that it uses.

    ``flags`` are those of the compiler, for a kernel of other instructions.  Raises OSError, saying why, where it
    cannot be made.
    """

    def __init__(self, flags: Sequence[str] = NATIVE) -> None:
        self._library = build(_SOURCE, flags)
        self._library.s3lab_level.restype = ctypes.c_char_p
        self.level = self._library.s3lab_level().decode()

    def multiply(self, rows: Rows, x: Tensor) -> Tensor:
        """Return x Wᵀ (T, M) in float32 of up to `TOKENS` tokens (T, K), for rows that `reason` has nothing against.

        Tokens are of the weight's dtype, or rounded to it.
        """
        values, x = rows.values.decode(), x.to(rows.values.dtype)
        if rows.lines is None:
            if rows.runs is not None:
                return self._multiply(_RUNS, rows.runs, rows.starts, values, x, *rows.shape)
            return self._multiply(_HALF if rows.half else _SINGLE, rows.bits, rows.starts, values, x, *rows.shape)
        own, columns = rows.lines
        x = pad(x[:, columns], (0, -len(columns) % _PADDED))
        y = self._multiply(_WHOLE, rows.bits, rows.starts, values, x, len(own), len(columns))
        return _place(y, own, rows.shape[0])

    def _multiply(self, layout: int, bits: Tensor, starts: Tensor, values: Tensor, x: Tensor, M: int, K: int) -> Tensor:
        y, x = x.new_empty(len(x), M, dtype=torch.float32), x.contiguous()
        call = getattr(self._library, f"s3lab_multiply_{_TYPES[values.dtype]}")
        pointers = map(pointer, (bits, starts, values, x, y))
        sizes = ctypes.c_int64(M), ctypes.c_int64(K), len(x), torch.get_num_threads()
        if call(layout, *pointers, *sizes):
            raise AssertionError(f"{len(x)} tokens are more than {TOKENS}")
        return y


@cache
def find_kernel() -> Kernel | str:
    """Return the kernel for this CPU, made on the first call, or why there is none."""
    try:
        return Kernel()
    except OSError as error:
        return str(error)


def reason(rows: Rows) -> str:
    """Return why no kernel multiplies these rows, empty where one does.

    >>> from s3lab.packing.codec import ALONE, pack
    >>> packed = pack(torch.tensor([[1.0, 0, 2, 0], [0, 0, 3, 4]]), "2:4")
    >>> reason(Rows.of(packed.places[ALONE], packed.values[ALONE]))
    'K = 4 is no multiple of 32'
    """
    if rows.bits.device.type != "cpu":
        return f"no kernel for {rows.bits.device.type}"
    if rows.values.kind != "same" or rows.values.dtype not in _TYPES:
        return "no kernel for " + (rows.values.kind if rows.values.kind != "same" else str(rows.values.dtype))
    if rows.lines is None and rows.shape[1] % _VECTOR:
        return f"K = {rows.shape[1]} is no multiple of {_VECTOR}"
    found = find_kernel()
    return found if isinstance(found, str) else ""


def multiply(rows: Rows, x: Tensor) -> Tensor | None:
    """Return x Wᵀ (T, M) of a few tokens (T, K), in float32 or their dtype; None where the weight must be unpacked."""
    if not reason(rows):
        kernel = find_kernel()
        assert isinstance(kernel, Kernel)
        return kernel.multiply(rows, x)
    if rows.lines is None:
        return None
    own, columns = rows.lines
    y = linear(x[:, columns], rows.values.decode().view(len(own), len(columns)))
    return _place(y, own, rows.shape[0])


def tell(rows: Rows) -> str:
    """Return how products with a weight are computed, for few tokens and for more."""
    what = "runs of 16" if rows.runs is not None else "8 of each 16 weights" if rows.half else "single weights"
    if rows.lines is not None:
        what = f"{len(rows.lines[0])} whole rows of {len(rows.lines[1])} columns"
    if not (why := reason(rows)):
        kernel = find_kernel()
        assert isinstance(kernel, Kernel)
        few = f"a kernel with {kernel.level} on {what}"
    elif rows.lines is not None:
        few = f"torch on {what} ({why})"
    else:
        return f"unpacked for each product ({why})"
    return f"up to {TOKENS} tokens by {few}, more unpacked"


def _place(y: Tensor, own: Tensor, M: int) -> Tensor:
    """Outputs (T, M) with those of some rows in their places, zero elsewhere."""
    return y if len(own) == M else y.new_zeros(len(y), M).index_copy_(1, own, y)
