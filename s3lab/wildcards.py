"""Settings per matrix: a table of globs over dotted names, the first match wins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from s3lab.errors import SpecError

T = TypeVar("T")


def assign(names: Iterable[str], table: Mapping[str, T], root: str = "") -> dict[str, T]:
    """Return for each name the value of the first glob that matches it, whole or without the leading ``root``.

    Raises SpecError for a name that no glob matches and for a glob that decides no name.

    >>> assign(["model.layers.0.o", "model.layers.1.o"], {"layers.0.*": "dense", "*.o": "2:4"}, root="model.")
    {'model.layers.0.o': 'dense', 'model.layers.1.o': '2:4'}
    """
    names = list(names)
    chosen = {}
    for name in names:
        chosen[name] = next((glob for glob in table if matches(name, glob, root)), None)
    if unmatched := [name for name, glob in chosen.items() if glob is None]:
        raise SpecError(
            f"no glob of {', '.join(table) or 'an empty table'} matches {_few(unmatched)}: add one, "
            "such as {'*': 'dense'} at the end"
        )
    if unused := [glob for glob in table if glob not in chosen.values()]:
        raise SpecError(f"{_few(unused)} decides no matrix: the names are {_few(names)}, and the first match wins")
    return {name: table[glob] for name, glob in chosen.items() if glob is not None}


def matches(name: str, glob: str, root: str = "") -> bool:
    """Return whether a glob matches a name, whole or without the leading ``root``.

    >>> matches("model.layers.0.o", "layers.*", root="model."), matches("model.layers.0.o", "*.k")
    (True, False)
    """
    return fnmatchcase(name, glob) or fnmatchcase(name.removeprefix(root), glob)


def _few(names: list[str]) -> str:
    told = ", ".join(repr(name) for name in names[:4]) or "none"
    return told + (f" and {len(names) - 4} more" if len(names) > 4 else "")
