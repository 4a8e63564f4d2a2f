"""What a notebook says of itself: its parameters, its code, how many of its cells have run."""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any

import nbformat

from s3lab.errors import DataError


def read_parameters(notebook: Path) -> dict[str, Any]:
    """Return the names and default values of a notebook's parameters cell; DataError if there is none."""
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise DataError(f"{notebook} has {len(tagged)} cells tagged 'parameters': tag exactly one")
    values = {}
    for line in tagged[0].source.splitlines():
        try:
            assignment = ast.parse(line).body
            values |= {step.targets[0].id: ast.literal_eval(step.value) for step in assignment}
        except (SyntaxError, AttributeError, ValueError):
            raise DataError(f"{notebook}: {line!r} in the parameters cell is no `name = literal`") from None
    return values


def count_cells(notebook: Path) -> int:
    """Return how many cells of a notebook hold code."""
    return sum(cell.cell_type == "code" for cell in nbformat.read(notebook, as_version=4).cells)


def hash_code(notebook: Path) -> str:
    """Return the SHA-256 of a notebook's code: its text and its outputs may change without changing what it makes."""
    cells = nbformat.read(notebook, as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()


def count_done(executed: Path, since: float) -> int | None:
    """Return how many code cells of a notebook under papermill have run; None if it has not begun ``since`` then.

    papermill saves the notebook before and after each cell; one that is read while it is being saved counts 0.
    """
    try:
        if executed.stat().st_mtime < since:
            return None
        cells = json.loads(executed.read_text())["cells"]
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        return 0
    own = [c for c in cells if c["cell_type"] == "code" and "injected-parameters" not in c["metadata"].get("tags", [])]
    return sum(cell["metadata"].get("papermill", {}).get("status") == "completed" for cell in own)
