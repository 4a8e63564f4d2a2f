"""Checks that raise, as the notebooks print them: True or False."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from s3lab.errors import S3Error


def passes(check: Callable[..., object], *given: Any) -> bool:
    """Return whether a check passes, and False where it raises an S3Error; any other error is raised.

    >>> import torch
    >>> from s3lab import parse
    >>> passes(parse("2:4").check, torch.tensor([[True, True, False, False]]))
    True
    >>> passes(parse("2:4").check, torch.tensor([[True, True, True, False]]))
    False
    """
    try:
        check(*given)
    except S3Error:
        return False
    return True
