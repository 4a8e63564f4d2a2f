"""Powers of two to measure tensors in, so that their squares stay within the range of their dtype: exact, both ways."""

from __future__ import annotations

from math import frexp, inf

import torch
from torch import Tensor
from torch.linalg import vector_norm

_LARGEST = 126  # 2^127 is in float32's range, and 2^-127 is not


def find_exponent(x: Tensor) -> int:
    """Return the e for which the largest |x| lies from 2^(e − 1) up to, but not at, 2^e; 0 for zeros, and for nothing.

    >>> import torch
    >>> find_exponent(torch.tensor([3.0, -4.0])), find_exponent(torch.tensor([1e-45]))
    (3, -148)
    """
    return frexp(float(vector_norm(x.detach(), inf)))[1] if x.numel() else 0


def shift(x: Tensor, exponent: int, out: Tensor | None = None) -> Tensor:
    """Return x·2^exponent, in two steps where the factor itself is out of range; x itself for an exponent of 0.

    ``out`` may be x, which then is changed in place.

    Exact but for what falls below the dtype's normal numbers.  Not for half dtypes, whose range is too small for this.

    >>> import torch
    >>> shift(shift(torch.tensor([3e38]), -128), 128).item() == torch.tensor(3e38).item()
    True
    """
    if abs(exponent) > _LARGEST:
        return shift(shift(x, exponent // 2, out), exponent - exponent // 2, out)
    return torch.mul(x, 2.0**exponent, out=out) if exponent else x
