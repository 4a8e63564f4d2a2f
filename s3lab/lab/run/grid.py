"""``name=value`` on the command line: values for the parameters of notebooks, and grids of them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

from s3lab.errors import DataError

_OPEN, _CLOSED = "([{", ")]}"


def read_assignments(texts: Iterable[str], option: str) -> dict[str, str]:
    """Return {name: text} from ``name=text``; DataError for one that is not, or a name given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not value or not name.isidentifier():
            raise DataError(f"{option} {text!r} is no name=value: write {option} seed=1")
        if name in found:
            raise DataError(f"{option} {name} is given twice: {found[name]!r} and {value!r}")
        found[name] = value
    return found


def read_value(text: str, default: Any) -> Any:
    """Return what a text stands for, given the parameter's default: itself for a text, a literal where it is one.

    >>> read_value("2:4", "8:16"), read_value("7", 0), read_value("['wanda']", []), read_value("auto", 0.01)
    ('2:4', 7, ['wanda'], 'auto')
    """
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def split_values(text: str) -> list[str]:
    """Split at the commas that stand in no brackets.

    >>> split_values("2:4,(M,K):(K,1) / (1,1) / (1,4) keep 2,50%")
    ['2:4', '(M,K):(K,1) / (1,1) / (1,4) keep 2', '50%']
    """
    values, depth = [""], 0
    for sign in text:
        depth += (sign in _OPEN) - (sign in _CLOSED)
        if sign == "," and depth == 0:
            values.append("")
        else:
            values[-1] += sign
    return [value.strip() for value in values]


def points(grid: Mapping[str, str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Return every point of a grid, {name: "value,value"}, as the name of a folder and as {name: value}.

    Raises DataError where two points would have one folder.

    >>> [folder for folder, _ in points({"solver": "sobs,admm", "spec": "2:4,50%/row"})]
    ['solver=sobs,spec=2-4', 'solver=sobs,spec=50%-row', 'solver=admm,spec=2-4', 'solver=admm,spec=50%-row']
    >>> list(points({}))
    [('', {})]
    """
    folders: dict[str, dict[str, str]] = {}
    for values in product(*map(split_values, grid.values())):
        point = dict(zip(grid, values, strict=True))
        folder = ",".join(f"{name}={re.sub(r'[^A-Za-z0-9.%_+]+', '-', value)}" for name, value in point.items())
        if folder in folders:
            raise DataError(f"two points of the grid have the folder {folder}: {folders[folder]} and {point}")
        folders[folder] = point
    yield from folders.items()


def as_name(point: Mapping[str, str]) -> str:
    """Return the values of a point as a name for tables and figures.

    >>> as_name({"solver": "sobs", "spec": "2:4"})
    'sobs_2_4'
    """
    return re.sub(r"\W+", "_", "_".join(point.values())).strip("_")
