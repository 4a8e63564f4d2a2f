"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a part to write, beside ``path``, that takes its place when the block ends without an error.

    The part is on the disk before it is renamed, so that a crash of the machine leaves the old file or the new one.
    The folder is made if it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        settle(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """Write ``data`` to a file, whole or not at all; the folder is made if it is missing."""
    with replacing(path) as part:
        part.write_bytes(data)


def settle(path: Path) -> None:
    """Wait until a file, or the list of a folder, is on the disk, so that a crash of the machine cannot undo it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
