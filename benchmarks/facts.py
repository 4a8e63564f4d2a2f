"""What the row of a benchmark says of the machine, and of the code that made it."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from importlib.util import find_spec

import torch

import s3lab as s3
from s3lab.lab.run.record import device_name


def find_commit() -> str:
    """Return the short name of the commit at HEAD."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip()


def describe(device: str = "cpu", *packages: str) -> dict[str, object]:
    """Return threads, device, commit, and versions: of torch, s3lab, and ``packages``, empty where one is missing."""
    return {
        "threads": torch.get_num_threads(),
        "device": device_name(device),
        "torch": torch.__version__,
        **{name: version(name) if find_spec(name) else "" for name in packages},
        "s3lab": s3.__version__,
        "commit": find_commit(),
    }
