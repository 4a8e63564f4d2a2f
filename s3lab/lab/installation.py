"""What this machine has of what s3lab can use, with one line of remedy for what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from itertools import groupby
from threading import Thread
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch

import s3lab
from s3lab.version import __version__

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_HUB = "https://huggingface.co"
_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Finding:
    """One thing looked for: the group it is of, its name, whether it is there, what is known, how to get it."""

    group: str
    name: str
    good: bool
    fact: str
    remedy: str = ""


def check(timeout_s: float = _TIMEOUT_S) -> list[Finding]:
    """Look at everything and return what was found; waits ``timeout_s`` at most for the network."""
    return [*check_core(), *check_packages(), *check_machine(), check_hub(timeout_s), *check_kernels()]


def report(findings: Iterable[Finding]) -> str:
    """Return a line for each finding, under its group, and under what is missing its remedy.

    >>> found = [Finding("machine", "CPU", True, "2 cores"), Finding("machine", "Triton", False, "no", "install it")]
    >>> print(report(found))
    machine
      ok  CPU          2 cores
      --  Triton       no
                       → install it
    """
    lines: list[str] = []
    for group, members in groupby(findings, key=lambda finding: finding.group):
        lines.append(group)
        for finding in members:
            lines.append(f"  {'ok' if finding.good else '--'}  {finding.name:<12} {finding.fact}")
            if not finding.good:
                lines.append(f"{'':<19}→ {finding.remedy}")
    return "\n".join(lines)


def works(findings: list[Finding]) -> bool:
    """Return whether the core does: whatever else is missing is missing for a part of s3lab only."""
    return all(finding.good for finding in findings if finding.group == "core")


def check_core() -> Iterator[Finding]:
    """Look whether Python is new enough, and a small weight can be pruned."""
    told = platform.python_version()
    yield Finding("core", "python", sys.version_info >= (3, 11), told, "install Python 3.11 or newer")
    weight = torch.tensor([[1.0, -4.0, 3.0, -2.0]])
    solution = s3lab.prune(weight, "2:4", torch.eye(4), "magnitude")
    right = solution.weight.tolist() == [[0.0, -4.0, 3.0, 0.0]]
    fact = f"{__version__}, {'prunes' if right else 'cannot prune'} a small weight"
    yield Finding("core", "s3lab", right, fact, "install torch and s3lab anew")


def check_packages() -> Iterator[Finding]:
    """Compare the packages of every extra with what pyproject.toml asks for."""
    if find_spec("packaging") is None:
        yield Finding("lab", "packaging", False, "missing: no version can be compared", "pip install packaging")
        return
    from packaging.requirements import Requirement

    needs = [Requirement(line) for line in requires("s3lab") or []]
    for extra in ["", *(metadata("s3lab").get_all("Provides-Extra") or [])]:
        install = f"pip install 's3lab[{extra}]'" if extra else "pip install s3lab"
        for need in needs:
            here, anyway = (need.marker is None or need.marker.evaluate({"extra": name}) for name in (extra, ""))
            if here and not (extra and anyway) and need.name != "s3lab":
                yield _check_package(extra or "core", need, install)


def _check_package(group: str, need: Requirement, install: str) -> Finding:
    try:
        found = version(need.name)
    except PackageNotFoundError:
        return Finding(group, need.name, False, "missing", install)
    if need.specifier.contains(found, prereleases=True):
        return Finding(group, need.name, True, found)
    return Finding(group, need.name, False, f"{found}, needs {need.specifier}", f"pip install '{need}'")


def check_machine() -> Iterator[Finding]:
    """Look at the processor, the CUDA device, and Triton."""
    cores = len(os.sched_getaffinity(0))
    fact = f"{cores} cores, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    yield Finding("machine", "CPU", True, f"{platform.machine()}, {fact}")
    cuda = torch.cuda.is_available()
    if cuda:
        device = torch.cuda.get_device_properties(0)
        told = f"{torch.cuda.device_count()} × {device.name}, {device.total_memory / 2**30:.0f} GiB"
        yield Finding("machine", "CUDA", True, told)
    else:
        built = torch.version.cuda is not None
        told = "no device, or no driver" if built else "this torch is a CPU build"
        remedy = "see that nvidia-smi lists a device" if built else "install a CUDA build: https://pytorch.org"
        yield Finding("machine", "CUDA", False, told, f"{remedy}; everything else runs on the CPU")
    if find_spec("triton") is None:
        yield Finding("machine", "Triton", False, "missing", "pip install triton; plain torch is used instead")
    elif not cuda and os.environ.get("TRITON_INTERPRET") != "1":
        remedy = "set TRITON_INTERPRET=1 to interpret kernels on the CPU; plain torch is used instead"
        yield Finding("machine", "Triton", False, f"{version('triton')}, but no CUDA device to compile for", remedy)
    else:
        yield Finding("machine", "Triton", True, version("triton") + ("" if cuda else ", interpreted on the CPU"))


def check_hub(timeout_s: float = _TIMEOUT_S) -> Finding:
    """Look whether the Hugging Face hub answers; gives up after ``timeout_s``, whatever the network does."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        remedy = "unset HF_HUB_OFFLINE; the built-in model and text need no network"
        return Finding("network", "hub", False, "not asked: HF_HUB_OFFLINE is set", remedy)
    url = os.environ.get("HF_ENDPOINT", _HUB)
    said: list[str] = []
    # Looking up a name knows no timeout, so it is done aside.
    asking = Thread(target=lambda: said.append(_ask(url, timeout_s)), daemon=True)
    asking.start()
    asking.join(timeout_s)
    reason = said[0] if said else f"no answer in {timeout_s:g} s"
    remedy = "see to the network, or to HTTPS_PROXY or HF_ENDPOINT; the built-in model and text need no network"
    return Finding("network", "hub", not reason, f"{url}: {reason or 'reachable'}", remedy)


def _ask(url: str, timeout_s: float) -> str:
    """Return why a server does not answer, in words; nothing if it does, be it with a refusal."""
    if urlsplit(url).scheme not in ("http", "https"):
        return "is no http(s) address"
    try:
        with urlopen(Request(url, method="HEAD"), timeout=timeout_s):
            return ""
    except HTTPError as error:
        return "" if error.code < 500 else str(error)
    except (OSError, ValueError, HTTPException) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


def check_kernels() -> Iterator[Finding]:
    """Look for Jupyter kernels; the notebooks ask for the one called python3, which must have s3lab."""
    if find_spec("nbclient") is None:
        yield Finding("jupyter", "python3", False, "no Jupyter here", "pip install 's3lab[lab]'")
        return
    from nbclient import NotebookClient
    from nbformat.v4 import new_notebook

    kernels = NotebookClient(new_notebook()).create_kernel_manager().kernel_spec_manager
    found = {name: entry["spec"] for name, entry in kernels.get_all_specs().items()}
    install = f"{sys.executable} -m ipykernel install --sys-prefix"
    if "python3" not in found:
        yield Finding("jupyter", "python3", False, "no such kernel: the notebooks ask for it", install)
    for name, spec in sorted(found.items()):
        program = spec["argv"][0]
        own = program.startswith("python")  # by that word Jupyter means the Python that it runs in itself
        there = shutil.which(sys.executable if own else program)
        yield Finding("jupyter", name, there is not None, there or f"{program} is not there", install)
