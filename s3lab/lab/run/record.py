"""Provenance: beside every table and figure a notebook makes, how it was made and how to make it again.

A name is up to four files: ``<name>.csv`` the table, ``<name>.png`` and ``<name>.svg`` the figure, and
``<name>.json`` the record.  Equal inputs give equal bytes, and every file appears whole, by rename.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s3lab.errors import DataError
from s3lab.files import write
from s3lab.lab.draw import plot
from s3lab.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

FIGURES = "S3LAB_FIGURES"
_PACKAGES = ("torch", "numpy", "pandas", "matplotlib", "safetensors", "transformers", "triton")


@dataclass(frozen=True)
class Picture:
    """A saved figure that a notebook shows at the size of its print."""

    path: Path

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        data = self.path.read_bytes()
        pixels = int.from_bytes(data[16:20], "big")  # the width stands at a fixed place in every PNG
        return data, {"width": round(pixels * 110 / plot.DPI)}


@dataclass
class Record:
    """What one notebook's run has made so far; made by `start`."""

    notebook: str
    parameters: dict[str, Any]
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def note(self, **facts: Any) -> None:
        """Add facts to every record of this run, such as ``solvers=[repr(solver)]``."""
        self.facts |= facts
        for name in self.files:
            self._write(name)

    def table(self, df: DataFrame, name: str) -> DataFrame:
        """Write ``<name>.csv`` and its record, and return the table, for the notebook to show."""
        self._save(name, ".csv", df.to_csv(index=False, lineterminator="\n").encode())
        return df

    def figure(self, fig: Figure, name: str) -> Picture:
        """Write ``<name>.png``, ``<name>.svg`` and their record, and return what the notebook shows."""
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            data = io.BytesIO()
            with plot.style({"svg.hashsalt": name}):
                fig.savefig(data, format=suffix[1:], dpi=plot.DPI, metadata=metadata)
            self._save(name, suffix, data.getvalue())
        return Picture(self.folder / f"{name}.png")

    def _save(self, name: str, suffix: str, data: bytes) -> None:
        if not name.isidentifier():
            raise DataError(f"{name!r} cannot name a table or figure: use letters, digits and underscores")
        write(self.folder / f"{name}{suffix}", data)
        self.files.setdefault(name, {})[f"{name}{suffix}"] = hashlib.sha256(data).hexdigest()
        self._write(name)

    def _write(self, name: str) -> None:
        record = {
            "notebook": f"notebooks/{self.notebook}.ipynb",
            "command": command(self.notebook, self.parameters),
            "parameters": self.parameters,
            "seeds": {key: value for key, value in self.parameters.items() if "seed" in key},
            **commit(),
            "versions": versions(),
            "device": device_name(str(self.parameters.get("device", "cpu"))),
            **self.facts,
            "time_s": round(time.perf_counter() - self.began, 3),
            "sha256": self.files[name],
        }
        write(self.folder / f"{name}.json", (json.dumps(record, indent=2, default=str) + "\n").encode())


def start(notebook: str, parameters: Mapping[str, Any], figures: str | Path | None = None) -> Record:
    """Begin the record of a notebook's run with its full parameter set.

    Files go to the folder ``figures``; None stands for the one that the variable S3LAB_FIGURES names, else
    for ``figures/`` beside ``notebooks/``.  The clock of ``time_s`` starts here.

    >>> run = start("00_example", {"seed": 0})
    >>> run.notebook, run.parameters
    ('00_example', {'seed': 0})
    """
    here = Path.cwd()
    root = here.parent if here.name == "notebooks" else here
    return Record(notebook, dict(parameters), Path(figures or os.environ.get(FIGURES) or root / "figures"))


def command(notebook: str, parameters: Mapping[str, Any]) -> str:
    """Return the shell command that makes the same run again, from the root of the repository.

    >>> print(command("00_example", {"seed": 0}))
    mkdir -p figures/runs && papermill --cwd notebooks ... -y '{"seed": 0}'
    """
    paths = [f"notebooks/{notebook}.ipynb", f"figures/runs/{notebook}.ipynb"]
    values = json.dumps(dict(parameters), default=str)
    return f"mkdir -p figures/runs && {shlex.join(['papermill', '--cwd', 'notebooks', *paths, '-y', values])}"


def commit() -> dict[str, Any]:
    """Return the git ``commit`` and whether the tree is ``dirty``, figures aside; None without git."""
    git = shutil.which("git")
    if git is None:
        return {"commit": None, "dirty": None}
    ask = [git, "--no-optional-locks"]
    head = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changes = subprocess.run(
        [*ask, "status", "--porcelain", "--", ":/", ":(top,exclude)figures"],
        capture_output=True,
        text=True,
        check=False,
    )
    if head.returncode or changes.returncode:
        return {"commit": None, "dirty": None}
    return {"commit": head.stdout.strip(), "dirty": bool(changes.stdout.strip())}


def is_fresh(table: Path) -> bool:
    """Return whether a table has a record beside it that names the commit checked out, and so is none stored before."""
    record, now = table.with_suffix(".json"), commit()["commit"]
    return now is not None and record.exists() and json.loads(record.read_text())["commit"] == now


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on, as far as installed."""
    found = {"python": platform.python_version(), "s3lab": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: str) -> str:
    """Return the model of the CPU, or of the CUDA device, never the name of the machine."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return f"{model or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
