"""Run the notebooks of a profile with papermill, and say what they made.

A profile is a YAML file, ``{notebook: {parameter: value}}``: the notebooks it runs, and where it differs from
their defaults.  A notebook with a list of such sets of values runs once for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import yaml

from s3lab.errors import DataError
from s3lab.folder import claim
from s3lab.lab.run.grid import as_name, points, read_assignments, read_value
from s3lab.lab.run.job import Job, Outcome
from s3lab.lab.run.notebook import read_parameters
from s3lab.lab.run.schedule import run_all

Sets = list[dict[str, Any]]


def reproduce(
    names: Iterable[str] = (),
    profile: str = "quick",
    out: str | Path = "figures",
    notebooks: str | Path = "notebooks",
    values: Iterable[str] = (),
    grid: Iterable[str] = (),
    workers: int = 1,
    dask: str | None = None,
    force: bool = False,
    progress: TextIO | None = None,
) -> list[Outcome]:
    """Run the notebooks of a profile in their order of dependence; return an outcome for each, in that of numbers.

    Tables, figures and records go to ``out``, the executed notebooks to ``out/runs``, a failed one with its
    traceback; it stops only those that read its tables.  What is up to date is skipped unless ``force``.  ``values``
    and ``grid`` are as in `plan`; ``workers`` and ``dask`` as in `s3lab.lab.run.schedule.run_all`.  Raises DataError
    for an unknown notebook, profile or parameter, and where another process holds ``out``, before anything runs.
    """
    jobs = plan(names, profile, notebooks, values, grid)
    with claim(out, force=True):  # its files have names of their own, and are there to be made again
        return run_all(jobs, Path(out).resolve(), workers, dask, force, progress)


def plan(
    names: Iterable[str],
    profile: str,
    notebooks: str | Path,
    values: Iterable[str] = (),
    grid: Iterable[str] = (),
) -> list[Job]:
    """Return the jobs of a profile, or those named, checked: every notebook and every parameter is there.

    ``values``, each ``name=value``, set a parameter of all notebooks that have it.  ``grid``, each
    ``name=value,value,…``, makes a job of each notebook that has all its names for each combination; it goes to a
    folder of its own, and its parameter ``name``, if nothing else sets it, tells the point.  A parameter that is set
    here takes the place of a list of sets that differ in it: what they have in common is left.

    A job whose parameter ``runs`` holds the parameter ``name`` of another reads that one's tables, and needs it.
    """
    folder = Path(notebooks)
    there = {path.stem: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    if not there:
        raise DataError(f"no notebooks in {folder}/: run this at the root of the repository")
    settings = read_profile(profile, folder)
    if unknown := next((name for name in settings if name not in there), None):
        raise DataError(f"profile {profile}: no notebook {unknown}; there are {', '.join(there)}")
    named = {_find(name, there) for name in names}
    chosen = [name for name in there if name in (named or settings)]
    if not chosen:
        raise DataError(f"profile {profile} names no notebook: there are {', '.join(there)}")
    known = {name: read_parameters(there[name]) for name in {*settings, *chosen}}
    for name, sets in settings.items():
        _check(name, sets, known[name], f"profile {profile}")
    given, axes = read_assignments(values, "--set"), read_assignments(grid, "--grid")
    if lacking := [name for name in chosen if not axes.keys() <= known[name].keys()]:
        chosen = [name for name in chosen if name not in lacking]
        if named or not chosen:
            lost = ", ".join(axes.keys() - known[lacking[0]].keys())
            raise DataError(f"--grid: {lacking[0]} has no parameter {lost}; it has {', '.join(known[lacking[0]])}")
    for name in given:
        if not any(name in known[notebook] for notebook in chosen):
            raise DataError(f"--set: none of {', '.join(chosen)} has a parameter {name}")
    jobs = []
    for name in chosen:
        own = {key: value for key, value in given.items() if key in known[name]}
        sets = _without(settings.get(name, [{}]), {*own, *axes})
        for point, coordinates in points(axes):
            told = {"name": as_name(coordinates)} if point and "name" in known[name] else {}
            texts = own | coordinates
            set_here = {key: read_value(text, known[name][key]) for key, text in texts.items()}
            for i, one in enumerate(sets, 1):
                number = "" if len(sets) == 1 else f"-{i}"
                jobs.append(Job(there[name], told | one | set_here, name + number + (point and f"@{point}"), point))
    return _with_needs(jobs, known)


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
        settings = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"profile {path} is not YAML: {error}") from None
    given: Iterable[tuple[Any, Any]] = settings.items() if isinstance(settings, dict) else [("", 0)]
    sets: dict[str, list[Any]] = {str(name): values if isinstance(values, list) else [values] for name, values in given}
    if not all(each and all(isinstance(values, dict | None) for values in each) for each in sets.values()):
        raise DataError(
            f"profile {path} must map each notebook to parameters, {{notebook: {{name: value}}}}, or to a list of such"
        )
    return {name: [values or {} for values in each] for name, each in sets.items()}


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
        spent = "up to date" if outcome.skipped else f"{outcome.time_s:6.1f} s"
        lines.append(f"{outcome.job.name:<{wide}}  {spent:>8}  {what}")
    ran = [outcome for outcome in outcomes if not outcome.error and not outcome.skipped]
    skipped = sum(outcome.skipped for outcome in outcomes)
    files = sum(len(outcome.made) for outcome in outcomes if not outcome.skipped)
    seconds = sum(outcome.time_s for outcome in outcomes)
    told = f"; up to date, and left: {skipped}" if skipped else ""
    lines.append(f"{len(ran)} of {len(outcomes)} notebooks ran in {seconds:.0f} s{told}; files made in {out}/: {files}")
    lines.append(f"the executed notebooks are in {out}/runs/")
    return "\n".join(lines)


def _check(notebook: str, sets: Sets, known: Mapping[str, Any], whose: str) -> None:
    """Raise DataError for a value that the notebook has no parameter for, or that YAML took for no text."""
    for name, value in ((name, value) for one in sets for name, value in one.items()):
        if name not in known:
            raise DataError(f"{whose}: {notebook} has no parameter {name}; it has {', '.join(known)}")
        if isinstance(known[name], str) and not isinstance(value, str | None):
            raise DataError(
                f"{whose}: {name} of {notebook} is a text, and YAML reads {value!r} there, as it does for a bare 2:4: "
                f"put the text in quotes"
            )


def _without(sets: Sets, names: set[str]) -> Sets:
    """Return sets of values that do not differ in these names: themselves, or the one that they have in common."""
    if all(one.get(name) == sets[0].get(name) for one in sets for name in names):
        return sets
    return [{key: value for key, value in sets[0].items() if all(one.get(key) == value for one in sets)}]


def _with_needs(jobs: list[Job], known: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """Return the jobs with the names of those whose tables they read, at their own point of a grid."""
    full = {job.name: {**known[job.notebook.stem], **job.parameters} for job in jobs}
    return [
        replace(
            job,
            needs=tuple(
                other.name
                for other in jobs
                if other.point == job.point
                and other is not job
                and full[other.name].get("name", "") in (full[job.name].get("runs") or ())
            ),
        )
        for job in jobs
    ]


def _find(name: str, there: dict[str, Path]) -> str:
    """Return the stem that a stem, a number or a path stands for."""
    stem = Path(name).stem
    found = [key for key in there if stem in (key, key.partition("_")[0])]
    if len(found) != 1:
        raise DataError(f"no notebook {name}: there are {', '.join(there)}, to be named in full or by number")
    return found[0]
