"""One run of one notebook: what is to be done, the doing in a process of its own, and what came of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

from s3lab.lab.run.fresh import find_fresh, hash_inputs, own_records, stamp
from s3lab.lab.run.notebook import read_parameters
from s3lab.lab.run.record import FIGURES

_SCRIPT = Path(__file__).with_name("execute.py")
_TICK_S = 0.1


@dataclass(frozen=True)
class Job:
    """One notebook to run, with the parameters that are set, and what the run is called.

    ``point`` is the point of a grid, in words that name a folder, and ``needs`` the names of the jobs that come first.
    """

    notebook: Path
    parameters: dict[str, Any]
    name: str
    point: str = ""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What came of a job: its files, its seconds, the last line of its error if it failed, whether it was skipped."""

    job: Job
    made: tuple[Path, ...]
    time_s: float
    error: str | None
    skipped: bool = False


def executed(job: Job, out: Path) -> Path:
    """Return where the executed notebook of a job is kept."""
    return out / "runs" / f"{job.name}.ipynb"


def run(
    job: Job, out: Path, variables: Mapping[str, str] | None = None, force: bool = False, stop: Event | None = None
) -> Outcome:
    """Run a job, unless its figures are up to date, and return what came of it.

    Files go to ``out``, of a point of a grid to ``out/<point>``.  ``variables`` are added to the environment,
    ``force`` runs it in any case, and setting ``stop`` ends it within seconds.  A failure is no exception but the
    outcome's error.
    """
    folder = out / job.point
    full = read_parameters(job.notebook) | job.parameters
    inputs = hash_inputs(job.notebook, full, folder)
    records = own_records(job.notebook, full, folder)
    if not force and (fresh := find_fresh(records, inputs)):
        return Outcome(job, _with_files(fresh), 0.0, None, skipped=True)
    before = {path: path.stat().st_mtime_ns for path in records}
    began = time.perf_counter()
    error = _execute(job, executed(job, out), {FIGURES: str(folder), **(variables or {})}, stop or Event())
    time_s = time.perf_counter() - began
    made = [p for p in own_records(job.notebook, full, folder) if before.get(p) != p.stat().st_mtime_ns]
    if error is None:
        stamp(made, inputs)
    return Outcome(job, _with_files(made), time_s, error)


def _execute(job: Job, to: Path, variables: Mapping[str, str], stop: Event) -> str | None:
    """Execute the notebook in another process; return the last line of its complaint if that fails."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="s3lab-") as scratch, (Path(scratch) / "stderr").open("w+") as stderr:
        order = {
            "notebook": str(job.notebook.resolve()),
            "to": str(to),
            "parameters": job.parameters,
            "cwd": str(job.notebook.parent.resolve()),
            "socket": f"{scratch}/kernel",
        }
        with subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT)],  # -P: the script's neighbours are no top-level modules
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, **variables},
            text=True,
            start_new_session=True,  # an interrupt from the keyboard is for the one who started it, to pass on
        ) as process:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            while process.poll() is None and not stop.wait(_TICK_S):
                continue
        stderr.seek(0)
        said = stderr.read().split("\n")
    if process.returncode == 0:
        return None
    return next((line.strip() for line in reversed(said) if line.strip()), f"exit status {process.returncode}")


def _with_files(records: list[Path]) -> tuple[Path, ...]:
    """Return the records and the files that they are of."""
    files = (r.parent / name for r in records for name in json.loads(r.read_text())["sha256"])
    return tuple(sorted({*records, *files}))
