"""Products of a few tokens with a packed weight that read its packed bytes only.

A kernel in C++, `decode.cpp`, reads the bits and values row by row.  One kernel serves every pattern, as all come as
bits by rows.  A mask that keeps whole rows and columns leaves one smaller dense weight, which has no bits to read.

The truth beside it is ``linear(x, rows.unpack(…))``.  Where there is no kernel, torch multiplies by the smaller
dense weight, and for any other mask a layer unpacks, and says why.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from s3lab.packing.rows import Rows
from s3lab.tensors.compiled import NATIVE, build

TOKENS = 8  # as many the kernel takes
_SOURCE = Path(__file__).with_suffix(".cpp")
_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ARGUMENTS = [ctypes.c_int, *[ctypes.c_void_p] * 5, *[ctypes.c_int64] * 2, *[ctypes.c_int] * 2]
_SINGLE, _HALF, _RUNS, _WHOLE = range(4)  # the layouts of the kernel
_VECTOR = 32  # a row is read in steps of so many weights
_PADDED = 64  # tokens end so, of whole rows, which are of any length

Product = Callable[[Tensor], Tensor]


class Kernel:
    """The compiled kernel: ``level`` names the instructions that it uses.

    ``flags`` are those of the compiler, for a kernel of other instructions.  Raises OSError, saying why, where it
    cannot be made.
    """

    def __init__(self, flags: Sequence[str] = NATIVE) -> None:
        library = build(_SOURCE, flags)
        library.s3lab_level.restype = ctypes.c_char_p
        self.level = library.s3lab_level().decode()
        self._calls = {dtype: getattr(library, f"s3lab_multiply_{name}") for dtype, name in _TYPES.items()}
        for call in self._calls.values():
            call.argtypes = _ARGUMENTS

    def __deepcopy__(self, memo: object) -> Kernel:
        """A kernel is shared by the copies of a layer."""
        return self

    def multiply(self, rows: Rows, x: Tensor) -> Tensor:
        """Return x Wᵀ (T, M) in float32 of up to `TOKENS` tokens (T, K), for rows that `reason` has nothing against.

        Tokens are of the weight's dtype, or rounded to it.
        """
        return self.product(rows)(x)

    def product(self, rows: Rows) -> Product:
        """Return `multiply` for one weight: what does not change from one product to the next is found once."""
        values = rows.values.decode()
        if rows.lines is not None:
            own, columns = rows.lines
            inner = partial(self._multiply, _WHOLE, rows.bits, rows.starts, values, (len(own), len(columns)))
            return partial(_multiply_lines, inner, own, columns, rows.shape[0])
        if rows.runs is not None:
            return partial(self._multiply, _RUNS, rows.runs, rows.starts, values, rows.shape)
        return partial(self._multiply, _HALF if rows.half else _SINGLE, rows.bits, rows.starts, values, rows.shape)

    def _multiply(
        self, layout: int, bits: Tensor, starts: Tensor, values: Tensor, shape: tuple[int, int], x: Tensor
    ) -> Tensor:
        x = x.to(values.dtype).contiguous()
        x = pad(x, (0, -shape[1] % _PADDED)) if layout == _WHOLE else x
        y, threads = x.new_empty(len(x), shape[0], dtype=torch.float32), torch.get_num_threads()
        pointers = bits.data_ptr(), starts.data_ptr(), values.data_ptr(), x.data_ptr(), y.data_ptr()
        if self._calls[values.dtype](layout, *pointers, *shape, len(x), threads):
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


def find_product(rows: Rows) -> Product | None:
    """Return the function from a few tokens (T, K) to x Wᵀ (T, M), None where the weight must be unpacked.

    Products are in float32 or the tokens' dtype.
    """
    if not reason(rows):
        kernel = find_kernel()
        assert isinstance(kernel, Kernel)
        return kernel.product(rows)
    if rows.lines is None:
        return None
    own, columns = rows.lines
    dense = rows.values.decode().view(len(own), len(columns))
    return partial(_multiply_lines, partial(linear, weight=dense), own, columns, rows.shape[0])


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


def _multiply_lines(product: Product, own: Tensor, columns: Tensor, M: int, x: Tensor) -> Tensor:
    """Products with whole rows and columns alone, at their places (T, M), zero elsewhere."""
    y = product(x[:, columns])
    return y if len(own) == M else y.new_zeros(len(y), M).index_copy_(1, own, y)
