"""Is a figure up to date? Its record says what it was made from; what is there now must be the same.

A run that ended well stamps its records with the hashes of its inputs: the notebook's code, its parameters, the source
of s3lab, the files that parameters name, and the tables of the runs it reads.  A run that was stopped stamps nothing.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import s3lab
from s3lab.files import digest, write
from s3lab.lab.run.notebook import hash_code


def hash_inputs(notebook: Path, parameters: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the SHA-256 of everything that a run is made from, by name.

    ``parameters`` is the full set, and ``folder`` where the run's tables and figures go.  A parameter that names a
    file, seen from the notebook, stands for its bytes; one that names a folder for the files directly in it.  A
    parameter ``runs`` names other runs, by their parameter ``name``, whose tables are read.
    """
    inputs = {
        "notebook": hash_code(notebook),
        "parameters": hashlib.sha256(_as_json(parameters).encode()).hexdigest(),
        "s3lab": hash_source(Path(s3lab.__file__).parent),
    }
    for text in _texts(parameters.values()):
        inputs |= {f"{text}: {file.name}": digest(file) for file in _files(notebook.parent / text)}
    tables = notebook.parent / parameters["tables"] if parameters.get("tables") else folder
    for path, record in _records(tables):
        if record.get("parameters", {}).get("name") in _texts([parameters.get("runs")]):
            inputs |= {f: digest(path.parent / f) for f in record["sha256"] if f.endswith(".csv")}
    return inputs


def own_records(notebook: Path, parameters: Mapping[str, Any], folder: Path) -> list[Path]:
    """Return the records in a folder that say they are of this notebook with this full set of parameters."""
    wanted = (f"notebooks/{notebook.stem}.ipynb", json.loads(_as_json(parameters)))
    return [path for path, record in _records(folder) if (record.get("notebook"), record.get("parameters")) == wanted]


def stamp(records: Iterable[Path], inputs: Mapping[str, str]) -> None:
    """Write into the records of one run what it was made from, and that they belong together."""
    records = list(records)
    for path in records:
        record = json.loads(path.read_text()) | {"run": {"made": [p.stem for p in records], "inputs": dict(inputs)}}
        write(path, (json.dumps(record, indent=2) + "\n").encode())


def find_fresh(records: Iterable[Path], inputs: Mapping[str, str]) -> list[Path]:
    """Return the records of a run that ended well on these inputs and whose files are intact; none if there is none.

    An input that was not there when the run began, such as a folder that it made itself, is not looked at.
    """
    found = {path: json.loads(path.read_text()) for path in records}
    for record in found.values():
        run = record.get("run", {"made": [], "inputs": {}})
        made = [path for path, other in found.items() if other.get("run") == run]
        if (
            run["made"] == [path.stem for path in made]
            and all(inputs.get(name) == value for name, value in run["inputs"].items())
            and all(_intact(path.parent, found[path]["sha256"]) for path in made)
        ):
            return made
    return []


def _intact(folder: Path, files: Mapping[str, str]) -> bool:
    return all((folder / name).is_file() and digest(folder / name) == value for name, value in files.items())


def _records(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        if isinstance(record, dict) and "sha256" in record:
            yield path, record


def _files(path: Path) -> list[Path]:
    """Return a file, or those directly in a folder; none for a text that names neither."""
    try:
        return [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    except OSError:  # there is no such folder, or the text is too long for a path
        return []


def _texts(values: Iterable[Any]) -> set[str]:
    """Return the texts among values and in the lists among them, the empty one aside."""
    flat = (item for value in values for item in (value if isinstance(value, list | tuple) else [value]))
    return {item for item in flat if isinstance(item, str) and item}


def hash_source(package: Path) -> str:
    """Return the SHA-256 of what a package, or one of its folders, does: of its code, and of its other files.

    Where a file lies, what it imports, and what its comments and docstrings say does not count.
    """
    names = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
    kept = [name for name in names if not any(part == "__pycache__" or part.startswith(".") for part in name.parts)]
    hashes = (_hash_file(package / name) for name in kept)
    return hashlib.sha256(_as_json({"files": sorted(hashes)}).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    return hash_code_of(path.read_text()) if path.suffix == ".py" else digest(path)


def hash_code_of(source: str) -> str:
    """Return the SHA-256 of a file of Python but for its imports, comments and docstrings.

    >>> hash_code_of("from a import f; f(1)  # now") == hash_code_of("'On f.'; from b.c import f; f(1)")
    True
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            told = 1 if ast.get_docstring(node, clean=False) is not None else 0
            node.body = [line for line in node.body[told:] if not isinstance(line, ast.Import | ast.ImportFrom)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), sort_keys=True, default=str)
