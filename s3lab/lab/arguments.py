"""The values that options take, each checked as it is read: a sentence for what cannot be, before anything is done."""

from __future__ import annotations

from argparse import ArgumentTypeError
from importlib.util import find_spec
from math import inf

from s3lab.errors import DataError, SpecError

_MOST = 2**31

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def count(text: str) -> int:
    """Read a whole number from 1 on.

    >>> count("8")
    8
    """
    return _whole(text, 1, _MOST, "a whole number from 1 on")


def seed(text: str) -> int:
    """Read the seed of a generator, a whole number from 0 on."""
    return _whole(text, 0, 2**63, "a whole number from 0 on")


def share(text: str) -> float:
    """Read a share, from 0 to below 1."""
    return _real(text, 1.0, "a share from 0 to below 1, such as 0.1")


def rate(text: str) -> float:
    """Read a learning rate, a finite number above 0."""
    what = "a number above 0, such as 1e-4"
    if (value := _real(text, inf, what)) == 0:
        raise ArgumentTypeError(f"{text!r} is out of range: give {what}")
    return value


def damping(text: str) -> float | str:
    """Read a damping: a share of the mean diagonal from 0 on, or "auto"."""
    return text if text == "auto" else _real(text, inf, "a number from 0 on, such as 0.01, or auto")


def budget(text: str) -> float:
    """Read a share of the dense cost, such as 50%."""
    from s3lab.models.search.allocate import read_target

    try:
        return read_target(text)
    except SpecError as error:
        raise ArgumentTypeError(str(error)) from error


def device(text: str) -> str:
    """Read the name of a device that is there: cpu, cuda, or one of several, such as cuda:1.

    >>> device("cpu")
    'cpu'
    """
    import torch

    kind, colon, number = text.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (number.isascii() and number.isdecimal())):
        raise ArgumentTypeError(f"{text!r} is no device: give cpu, cuda, or one of several, such as cuda:1")
    there = torch.cuda.device_count() if kind == "cuda" else 1
    if there <= int(number or 0):
        raise ArgumentTypeError(f"there is no {text}, but {there} such devices: give another, such as cpu")
    return text


def path(text: str) -> str:
    """Read a path, or a name that may stand in place of one."""
    if not text:
        raise ArgumentTypeError("an empty text is no path: '.' is the folder that you are in")
    if "\0" in text or not _is_unicode(text):
        raise ArgumentTypeError(f"{text!a} is no path in UTF-8 that s3lab can write down: give another name")
    return text


def _whole(text: str, least: int, most: int, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) < most):
        raise ArgumentTypeError(f"{text!r} is out of range: give {what}")
    return int(text)


def _real(text: str, most: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < most:
        raise ArgumentTypeError(f"{text!r} is out of range: give {what}")
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def need(*packages: str) -> None:
    """Raise DataError, saying how they come, for packages that are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise DataError(f"this needs {', '.join(missing)}: pip install 's3lab[all]'")
