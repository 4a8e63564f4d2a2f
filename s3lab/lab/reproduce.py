"""Run the notebooks of a profile with papermill, and say what they made.

A profile is a YAML file, ``{notebook: {parameter: value}}``: the notebooks it runs, and where it differs from
their defaults.  A notebook with a list of such sets of values runs once for each.
"""

from __future__ import annotations

import ast
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO

import nbformat
import papermill
import yaml
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm
from traitlets.config import Config

from s3lab.errors import DataError
from s3lab.lab.record import FIGURES


@dataclass(frozen=True)
class Job:
    """One notebook to run, with the parameters that a profile sets, and what the run is called."""

    notebook: Path
    parameters: dict[str, Any]
    name: str


@dataclass(frozen=True)
class Outcome:
    """What came of a job: the files it made, its seconds, and the last line of its error, if it failed."""

    job: Job
    made: tuple[Path, ...]
    time_s: float
    error: str | None


def reproduce(
    names: Iterable[str] = (),
    profile: str = "quick",
    out: str | Path = "figures",
    notebooks: str | Path = "notebooks",
    progress: TextIO | None = None,
) -> list[Outcome]:
    """Run the notebooks of a profile in the order of their numbers; return an outcome for each.

    Tables, figures and records go to ``out``, the executed notebooks to ``out/runs``, a failed one with its
    traceback; it does not stop the others.  Raises DataError for an unknown notebook, profile or parameter,
    before anything runs.
    """
    jobs = plan(names, profile, notebooks)
    out = Path(out).resolve()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    cells = {job.name: count_cells(job.notebook) for job in jobs}
    outcomes: list[Outcome] = []
    # Threads that spin while they wait slow each other down a hundredfold on a machine that is shared.
    surroundings = {FIGURES: str(out), "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    with _surround(**surroundings), tqdm(total=sum(cells.values()), unit="cell", file=progress) as bar:
        for job in jobs:
            bar.set_description(job.name)
            after = bar.n + cells[job.name]
            outcomes.append(_run(job, out, bar))
            bar.update(after - bar.n)
    return outcomes


def plan(names: Iterable[str], profile: str, notebooks: str | Path) -> list[Job]:
    """Return the jobs of a profile, or those named, checked: every notebook and every parameter is there."""
    folder = Path(notebooks)
    there = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not there:
        raise DataError(f"no notebooks in {folder}/: run this at the root of the repository")
    settings = read_profile(profile, folder)
    for name, sets in settings.items():
        if name not in there:
            raise DataError(f"profile {profile}: no notebook {name}; there are {', '.join(there)}")
        known = read_parameters(there[name])
        if unknown := ", ".join(key for values in sets for key in values if key not in known):
            raise DataError(f"profile {profile}: {name} has no parameter {unknown}; it has {', '.join(known)}")
    chosen = {_find(name, there) for name in names} or set(settings)
    if not chosen:
        raise DataError(f"profile {profile} names no notebook: there are {', '.join(there)}")
    jobs = []
    for name, path in there.items():
        sets = settings.get(name, [{}]) if name in chosen else []
        jobs += [Job(path, v, name if len(sets) == 1 else f"{name}-{i}") for i, v in enumerate(sets, 1)]
    return jobs


def read_profile(profile: str, notebooks: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the sets of values for each notebook of a profile, by name or by the path of a YAML file.

    ``quick`` is notebooks/profiles/quick.yaml.
    """
    is_file = profile.endswith((".yaml", ".yml"))
    path = Path(profile) if is_file else notebooks / "profiles" / f"{profile}.yaml"
    if not path.is_file():
        named = ", ".join(sorted(p.stem for p in (notebooks / "profiles").glob("*.yaml")))
        raise DataError(f"no profile {profile}: {path} is not there; name one of {named}, or a YAML file")
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DataError(f"profile {path} is not YAML: {error}") from None
    given: Iterable[tuple[Any, Any]] = settings.items() if isinstance(settings, dict) else [("", 0)]
    sets: dict[str, list[Any]] = {str(name): values if isinstance(values, list) else [values] for name, values in given}
    if not all(each and all(isinstance(values, dict | None) for values in each) for each in sets.values()):
        raise DataError(
            f"profile {path} must map each notebook to parameters, {{notebook: {{name: value}}}}, or to a list of such"
        )
    return {name: [values or {} for values in each] for name, each in sets.items()}


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


def summarise(outcomes: Iterable[Outcome], out: str | Path) -> str:
    """Return the report of a run, a line for each notebook: what was made, how long it took, what failed.

    >>> job = Job(Path("notebooks/01_read_a_pattern.ipynb"), {}, "01_read_a_pattern")
    >>> print(summarise([Outcome(job, (Path("figures/patterns.csv"),), 9.5, None)], "figures"))
    01_read_a_pattern     9.5 s  patterns (.csv)
    1 of 1 notebooks ran in 10 s; files made in figures/: 1
    the executed notebooks are in figures/runs/
    """
    outcomes = list(outcomes)
    wide = max(len(outcome.job.name) for outcome in outcomes)
    lines = []
    for outcome in outcomes:
        made: dict[str, list[str]] = {}
        for path in outcome.made:
            made.setdefault(path.stem, []).append(path.suffix)
        files = ", ".join(f"{stem} ({' '.join(suffixes)})" for stem, suffixes in made.items())
        what = f"FAILED: {outcome.error}" if outcome.error else files or "no files"
        lines.append(f"{outcome.job.name:<{wide}}  {outcome.time_s:6.1f} s  {what}")
    ran = sum(outcome.error is None for outcome in outcomes)
    files = sum(len(outcome.made) for outcome in outcomes)
    seconds = sum(outcome.time_s for outcome in outcomes)
    lines.append(f"{ran} of {len(outcomes)} notebooks ran in {seconds:.0f} s; files made in {out}/: {files}")
    lines.append(f"the executed notebooks are in {out}/runs/")
    return "\n".join(lines)


def _run(job: Job, out: Path, bar: tqdm) -> Outcome:
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    began, error = time.perf_counter(), None
    try:
        # The kernel listens on files of its user's, not on ports that everyone on the machine can reach.
        with TemporaryDirectory(prefix="s3lab-") as folder:
            papermill.execute_notebook(
                job.notebook.resolve(),
                out / "runs" / f"{job.name}.ipynb",
                job.parameters,
                cwd=job.notebook.parent.resolve(),
                progress_bar=False,
                on_cell_executed=lambda **_: bar.update(1),
                config=Config(KernelManager={"transport": "ipc", "ip": f"{folder}/kernel"}),
            )
    except PapermillExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}".splitlines()[0]
    except DeadKernelError:
        error = "its kernel died, most often for want of memory"
    time_s = time.perf_counter() - began
    records = [path for path in sorted(out.glob("*.json")) if before.get(path) != path.stat().st_mtime_ns]
    made = (
        file for record in records for file in [record, *(out / f for f in json.loads(record.read_text())["sha256"])]
    )
    return Outcome(job, tuple(sorted(made)), time_s, error)


def _find(name: str, there: dict[str, Path]) -> str:
    """Return the stem that a stem, a number or a path stands for."""
    stem = Path(name).stem
    found = [key for key in there if stem in (key, key.partition("_")[0])]
    if len(found) != 1:
        raise DataError(f"no notebook {name}: there are {', '.join(there)}, to be named in full or by number")
    return found[0]


@contextmanager
def _surround(**variables: str) -> Iterator[None]:
    """Give the kernels started inside these environment variables."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
