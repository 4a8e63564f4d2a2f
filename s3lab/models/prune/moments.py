"""The second moments of a dense model's inputs in a folder: measured once, for all runs that prune by them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from s3lab.errors import DataError
from s3lab.files import replacing, write
from s3lab.models.prune.flow import Flow
from s3lab.models.prune.measured import Measured, measure_layer

_MANIFEST = "moments.json"
_PARTS = ("H", "H_test", "outputs")


def keep_moments(path: str | Path, settings: Mapping[str, Any], begin: Callable[[], Flow]) -> list[Path]:
    """Return a file for each decoder layer that `read_moments` reads, measured first if the folder has none.

    ``settings`` tell the model and its calibration text, and ``begin`` gives the flow whose dense stream is sent
    through all layers.  A folder that was left half-made is made again.  Raises DataError for one of other settings.
    """
    folder, known = Path(path), json.loads(json.dumps(dict(settings)))
    found = _read_manifest(folder)
    theirs = found.get("settings", known)
    if differing := [key for key in {**known, **theirs} if known.get(key) != theirs.get(key)]:
        raise DataError(
            f"the moments in {str(folder)!r} are of other settings ({', '.join(differing)}): give another folder"
        )
    if found and all((folder / name).is_file() for name in found["layers"]):
        return [folder / name for name in found["layers"]]
    flow = begin()
    flow.embed()
    names = [f"{index:03}.safetensors" for index in range(len(flow.decoder.layers))]
    for index, name in enumerate(names):
        measured = measure_layer(flow, index)
        if flow.processes.rank == 0:
            _write(folder / name, measured)
    if flow.processes.rank == 0:
        write(folder / _MANIFEST, (json.dumps({"settings": known, "layers": names}, indent=1) + "\n").encode())
    flow.processes.wait()
    return [folder / name for name in names]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """What the manifest of a folder says, nothing where there is none that can be read."""
    try:
        return json.loads((folder / _MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}


def read_moments(path: Path) -> dict[tuple[str, ...], Measured]:
    """Return what is known of each input of a layer, by the names of the matrices that share it."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
        return {
            tuple(key.split(",")): Measured(
                **{part: file.get_tensor(f"{key}/{part}") if part in told["parts"] else None for part in _PARTS},
                tokens=told["tokens"],
                all_tokens=told["all_tokens"],
            )
            for key, told in sorted(facts.items(), key=lambda item: item[1]["place"])
        }


def _write(path: Path, measured: Mapping[tuple[str, ...], Measured]) -> None:
    from safetensors.torch import save_file

    tensors, facts = {}, {}
    for place, (names, found) in enumerate(measured.items()):
        parts = {part: H.cpu() for part in _PARTS if (H := getattr(found, part)) is not None}
        tensors |= {f"{','.join(names)}/{part}": H for part, H in parts.items()}
        told = {"place": place, "parts": [*parts], "tokens": found.tokens, "all_tokens": found.all_tokens}
        facts[",".join(names)] = json.dumps(told)
    with replacing(path) as part:
        save_file(tensors, part, facts)
