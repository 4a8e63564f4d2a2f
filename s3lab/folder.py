"""A folder for results: whose it may be, and one process at a time in it.

``.s3lab`` marks a folder that s3lab made, and says who is at work there; ``.s3lab.lock`` is what a process locks, and
the system releases where it dies.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from s3lab.errors import DataError
from s3lab.files import PARTS, write

MARK, LOCK = ".s3lab", ".s3lab.lock"
_SIGNS = (MARK, "s3lab.json")  # of what s3lab made: the mark, or the record of a pruned model
_TOLD = 3


@contextmanager
def claim(path: str | Path | None, force: bool = False) -> Iterator[None]:
    """Have a folder, made if it is missing, for oneself while the block runs, and leave no trace if nothing is made.

    What is left of files that a killed process had begun is removed.  None is no folder, and claims nothing.

    Raises DataError where the folder is no place for results (`check_folder`, which ``force`` leaves out), or another
    process holds it, naming that.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as home, claim(f"{home}/new"):
    ...     sorted(os.listdir(f"{home}/new"))
    ['.s3lab', '.s3lab.lock']
    """
    if path is None:
        yield
        return
    from filelock import FileLock, Timeout

    path = Path(path)
    if not force:
        check_folder(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path / LOCK, timeout=0)
    try:
        with lock:
            try:
                _sweep(path)
                _tell(path, {"pid": os.getpid(), "host": platform.node(), "since": f"{datetime.now():%Y-%m-%d %H:%M}"})
                yield
            finally:
                if missing and {entry.name for entry in path.iterdir()} <= {MARK, LOCK}:
                    for name in (MARK, LOCK):
                        (path / name).unlink(missing_ok=True)
                else:
                    with suppress(OSError):
                        _tell(path, {})
    except Timeout:
        raise DataError(f"{str(path)!r} is in use{_read_holder(path)}: wait for its end, or give another one") from None
    finally:
        with suppress(OSError):  # which says that somebody has put something there
            for folder in missing:
                folder.rmdir()


def check_folder(path: str | Path) -> None:
    """Raise DataError unless a folder is missing, is empty, or was made by s3lab.

    >>> check_folder("no/such/folder")
    """
    path = Path(path)
    if not path.is_dir():
        if path.exists():
            raise DataError(f"{str(path)!r} is a file, where a folder is to be: give another name")
        return
    entries = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK and not entry.match(PARTS))
    if entries and not any((path / sign).is_file() for sign in _SIGNS):
        told = ", ".join(entries[:_TOLD]) + (", …" if len(entries) > _TOLD else "")
        raise DataError(
            f"{str(path)!r} holds files that s3lab did not make ({told}): give a new or an empty folder, or --force to "
            "write there all the same"
        )


def _sweep(path: Path) -> None:
    """Remove what a process that was killed had begun to write: whoever holds the folder is the only one to write."""
    for part in list(path.rglob(PARTS)):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def _tell(path: Path, holder: dict[str, object]) -> None:
    write(path / MARK, (json.dumps(holder) + "\n").encode())


def _read_holder(path: Path) -> str:
    """What the mark says of the one who holds a folder, in words."""
    try:
        holder = json.loads((path / MARK).read_bytes())
        return " by process {pid} on {host} since {since}".format(**holder)
    except (OSError, ValueError, TypeError, KeyError):  # it has only just come, and not said so yet
        return " by another process"
