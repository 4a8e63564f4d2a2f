"""Files that are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTS = ".*.s3lab.part"  # the names of parts


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield the path of a part to write, beside ``path``, that takes its place when the block ends without an error.

    With ``sync`` the part is on the disk before it is renamed, so that a crash of the machine leaves the old file or
    the new one.  The folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.s3lab.part")
    try:
        yield part
        if sync:
            settle(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def find_cache() -> Path:
    """Return the folder for what is kept: $S3LAB_CACHE, else $XDG_CACHE_HOME/s3lab, else ~/.cache/s3lab."""
    if own := os.environ.get("S3LAB_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s3lab"


def write(path: Path, data: bytes) -> None:
    """Write ``data`` to a file, whole or not at all; the folder is made if it is missing."""
    with replacing(path) as part:
        part.write_bytes(data)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(path: Path) -> None:
    """Wait until a file, or the list of a folder, is on the disk, so that a crash of the machine cannot undo it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def telling(path: Path) -> Iterator[None]:
    """Have what safetensors says of a disk that it cannot write to raised as what it is, an OSError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from error
