"""Kernels in C++, translated by the system's compiler for this very CPU when they are first needed.

A kernel includes no header of torch, which would be most of the time to translate it, and runs on torch's own threads.
What was translated is kept in the cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from s3lab.files import find_cache, replacing

NATIVE = ("-march=native",)


def build(source: Path, flags: Sequence[str] = NATIVE) -> ctypes.CDLL:
    """Return the library of a C++ ``source``, translated with the compiler's ``flags``, or as it lies in the cache.

    Raises OSError, saying why, where there is no compiler, or it fails.
    """
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C++ compiler")
    key = "\n".join([source.read_text(), compiler, *flags, _tell_cpu()]).encode()
    # without a runtime of its own the kernel uses that of torch, whose threads are there already
    for link in ((), ("-fopenmp",)):
        path = find_cache() / f"{source.stem}-{hashlib.sha256(key + repr(link).encode()).hexdigest()[:16]}.so"
        if not path.exists():
            _compile(compiler, source, flags, link, path)
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            if link:
                raise
    raise AssertionError


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Return where the numbers of a contiguous tensor lie."""
    return ctypes.c_void_p(tensor.data_ptr())


def _tell_cpu() -> str:
    """What instructions there are: a cache may be shared by machines."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _compile(compiler: str, source: Path, flags: Sequence[str], link: Sequence[str], path: Path) -> None:
    with replacing(path) as part:
        object_ = part.with_suffix(".o")
        common = [compiler, "-O3", "-std=c++17", "-fPIC", "-w", *flags]
        try:
            for command in (
                [*common, "-fopenmp", "-c", str(source), "-o", str(object_)],
                [*common, "-shared", *link, str(object_), "-o", str(part)],
            ):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        except subprocess.SubprocessError as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            raise OSError(f"{compiler} failed: {lines[0] if lines else 'no message'}") from error
        finally:
            object_.unlink(missing_ok=True)
