"""The directory of a run: what is done, written so that it is there whole or not at all, and known by its hash.

``manifest.json`` holds the settings, the rows and the hash of every other file; ``layers/`` the pruned weights of each
finished layer, and the parts of those that are wrapped; ``state/`` the hidden states with which the next layer begins.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3lab.errors import DataError
from s3lab.files import digest, replacing, telling, write
from s3lab.tensors.processes import SOLO, ProcessGroup

MANIFEST = "manifest.json"


class RunDir:
    """A run directory, opened for one set of settings, which JSON must be able to hold.

    A manifest that cannot be read, or is not as it was written, counts as none.  The processes of a group all open it
    and save what is theirs; the first one keeps the manifest and the weights.  Raises DataError where the directory
    belongs to other settings, naming them, or holds a manifest of something else.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as out:
    ...     RunDir(out, {"spec": "2:4"}).layers, RunDir(out, {"spec": "2:4"}).damaged
    ([], [])
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any] | None = None,
        processes: ProcessGroup = SOLO,
    ) -> None:
        self.path, self.processes = Path(path), processes
        self.manifest: dict[str, Any] = {
            "settings": json.loads(json.dumps(settings)),
            "facts": json.loads(json.dumps(facts or {}, default=str)),
            "layers": [],
            "state": {"layer": 0, "sha256": {}},
        }
        self.damaged: list[str] = []
        self._hashes: dict[str, str] = {}
        for turn in (True, False):  # what the first finds broken, it mends before the others look
            if (processes.rank == 0) == turn:
                self._open()
            processes.wait()

    @property
    def layers(self) -> list[dict[str, Any]]:
        """What was committed, one record per finished layer."""
        return self.manifest["layers"]

    def save(self, name: str, tensors: Mapping[str, Tensor], sealed: bool = True) -> None:
        """Write tensors to a safetensors file of the directory and remember its hash for the next commit.

        What a crash of the machine takes from it, its hash tells.  What is not ``sealed`` is of use to this process
        alone, and has no hash.
        """
        from safetensors.torch import save_file

        path = self.path / name
        with replacing(path, sync=False) as part, telling(path):
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part)
            if sealed:
                self._hashes[name] = digest(part)

    def load(self, name: str) -> dict[str, Tensor]:
        """Read the tensors of a file."""
        from safetensors.torch import load_file

        return load_file(self.path / name)

    def commit(self, weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Make a layer final: its weights, its record, and the state that the next one begins with."""
        index = len(self.layers)
        if self.processes.rank == 0:
            self.save(layer_file(index), weights)
        self._share_hashes()
        self.layers.append({**record, "sha256": self._hashes[layer_file(index)]})
        begun = {name: sha256 for name, sha256 in self._hashes.items() if name.startswith(state_folder(index + 1))}
        self.manifest["state"] = {"layer": index + 1, "sha256": begun}
        self._store()

    def drop(self, index: int) -> None:
        """Remove the state that a layer began with."""
        if self.processes.rank == 0:
            shutil.rmtree(self.path / state_folder(index), ignore_errors=True)
        self._hashes.clear()

    def close(self) -> None:
        """Remove the state that a finished run needs no more."""
        if self.processes.rank == 0 and (self.path / "state").exists():
            self.manifest["state"] = {"layer": len(self.layers), "sha256": {}}
            self._store()
            shutil.rmtree(self.path / "state")

    def usable_state(self) -> int:
        """Return the layer that the stored state belongs to if that is the next one and all of it is intact, else 0."""
        return int(self.processes.max(float(self._check_state() if self.processes.rank == 0 else 0)))

    def _check_state(self) -> int:
        state = self.manifest["state"]
        if state["layer"] != len(self.layers) or not state["sha256"]:
            return 0
        broken = [name for name, sha256 in state["sha256"].items() if not self._has(name, sha256)]
        self.damaged += broken
        return 0 if broken else state["layer"]

    def _open(self) -> None:
        if (self.path / MANIFEST).exists():
            self._resume()
        else:
            self._store()

    def _resume(self) -> None:
        try:
            found = json.loads((self.path / MANIFEST).read_bytes())
        except ValueError:
            found = None
        if isinstance(found, dict) and "settings" not in found:
            raise DataError(f"{str(self.path / MANIFEST)!r} belongs to something else: give another directory")
        if not isinstance(found, dict) or found.pop("sha256", None) != _seal(found):
            self.damaged.append(MANIFEST)
            return self._store()
        theirs, ours = found["settings"], self.manifest["settings"]
        if differing := [key for key in {**ours, **theirs} if theirs.get(key) != ours.get(key)]:
            told = "; ".join(f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in differing)
            raise DataError(f"the run in {str(self.path)!r} has other settings: {told}: give another directory")
        self.manifest = found
        for index, layer in enumerate(self.layers):
            if not self._has(layer_file(index), layer["sha256"]):
                self.damaged.append(layer_file(index))
                del self.layers[index:]
                break

    def _has(self, name: str, sha256: str) -> bool:
        return (self.path / name).is_file() and digest(self.path / name) == sha256

    def _share_hashes(self) -> None:
        """Learn the hashes of what the other processes have saved, and wait until all have."""
        line = bytearray(json.dumps(self._hashes).encode() + b"\n")
        for told in bytes(self.processes.gather(torch.frombuffer(line, dtype=torch.uint8)).tolist()).splitlines():
            self._hashes |= json.loads(told)

    def _store(self) -> None:
        if self.processes.rank > 0:
            return
        sealed = {**self.manifest, "sha256": _seal(self.manifest)}
        write(self.path / MANIFEST, (json.dumps(sealed, indent=1) + "\n").encode())


def layer_file(index: int) -> str:
    """The file of a finished layer's weights."""
    return f"layers/{index:03}.safetensors"


def state_folder(index: int) -> str:
    """The folder of the hidden states that a layer begins with."""
    return f"state/{index:03}"


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of tensors: their names, shapes, dtypes and bits, whatever their order and device.

    >>> hash_tensors({"a": torch.zeros(2)}) == hash_tensors({"a": torch.zeros(2).bfloat16()})
    False
    """
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _seal(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
