"""Packed weights in safetensors files: names, the text that describes them, and its checks.

A matrix ``NAME.weight`` becomes ``NAME.values``, ``NAME.index`` and, where values are rounded, ``NAME.scales``; of a
coupling the first matrix has the index.  ``NAME.left`` and ``NAME.right`` are the blocks around a wrapped core.  What
is not packed stands as ever.  The header of each file has, under ``s3lab``, a text in JSON: the version of the layout,
for each packed weight its spec, names, shapes, dtype and counts, and the SHA-256 of every tensor; and under
``s3lab.seal`` the SHA-256 of that text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3lab.algebra.patterns import parse
from s3lab.errors import DataError
from s3lab.files import replacing, write
from s3lab.packing.codec import Packed
from s3lab.packing.values import Values
from s3lab.tensors.wraps import Wraps

VERSION = 2  # 1 has no wrapped cores, and is read, too
TEXT, SEAL = "s3lab", "s3lab.seal"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = torch.bfloat16, torch.float16, torch.float32, torch.float64
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}
_STORED = {"same": None, "int8": torch.int8, "int4": torch.uint8}


@dataclass(frozen=True, eq=False)
class Entry:
    """One packed weight, or several of a coupling, and the ``names`` of its matrices by those that its pattern has.

    The tensors ``NAME.weight`` of those in ``transposed`` were (K, M).  ``wraps`` are what surrounds the weight, if
    that is the core of a wrapped matrix.
    """

    packed: Packed
    names: Mapping[str, str]
    transposed: frozenset[str] = frozenset()
    wraps: Wraps | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by name."""
        found = {}
        for key, name in self.names.items():
            values = self.packed.values[key]
            found[f"{name}.values"] = values.data
            if values.scales is not None:
                found[f"{name}.scales"] = values.scales
            if self.wraps is not None:
                found |= {f"{name}.{side}": blocks for side, blocks in self.wraps._asdict().items()}
        return found | {f"{next(iter(self.names.values()))}.index": self.packed.index}

    def unpack(self) -> dict[str, Tensor]:
        """Return the dense tensors ``NAME.weight`` as they were; DataError where the bytes are of no such weight."""
        found = {}
        for key, name in self.names.items():
            W = self.packed.unpack_one(key)
            W = W if self.wraps is None else self.wraps.around(W)
            found[f"{name}.weight"] = W.T.contiguous() if name in self.transposed else W
        return found

    def describe(self) -> dict[str, Any]:
        """Return what the header says of it."""
        packed, first = self.packed, next(iter(self.packed.values.values()))
        return {
            "spec": str(packed.pattern),
            "names": dict(self.names),
            "shapes": {key: list(shape) for key, shape in packed.shapes.items()},
            "kept": {key: values.count for key, values in packed.values.items()},
            "dtype": str(first.dtype).removeprefix("torch."),
            "values": first.kind,
            "group": first.group,
            "transposed": sorted(self.transposed),
            "wrap": None if self.wraps is None else self.wraps.block,
        }

    @classmethod
    def read(cls, told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Entry:
        """Return the entry that a header tells of, from the tensors of the files; DataError where one is not so."""
        dtype, kind = _DTYPES[told["dtype"]], told["values"]
        names, values = dict(told["names"]), {}
        for key, name in names.items():
            data = _expect(tensors, f"{name}.values", _STORED[kind] or dtype)
            scales = None if kind == "same" else _expect(tensors, f"{name}.scales", dtype)
            values[key] = Values(kind, dtype, int(told["kept"][key]), data, scales, int(told["group"]))
        index = _expect(tensors, f"{next(iter(names.values()))}.index", torch.uint8)
        shapes = {key: (int(shape[0]), int(shape[1])) for key, shape in told["shapes"].items()}
        packed = Packed(parse(told["spec"]), shapes, values, index)
        wraps = _read_wraps(told, tensors, dtype) if told.get("wrap") else None
        return cls(packed, names, frozenset(told["transposed"]), wraps)


@dataclass(frozen=True, eq=False)
class Header:
    """What the header of a packed file says: the description of each entry, and the SHA-256 of every tensor."""

    entries: list[dict[str, Any]]
    sha256: dict[str, str]

    @property
    def parts(self) -> set[str]:
        """The names of the tensors that packed weights are made of."""
        return set().union(*map(_parts, self.entries))

    def write(self) -> dict[str, str]:
        """Return the header's metadata."""
        text = json.dumps({"version": VERSION, "entries": self.entries, "sha256": self.sha256}, sort_keys=True)
        return {"format": "pt", TEXT: text, SEAL: _hash(text.encode())}


def seal(entries: Iterable[dict[str, Any]], tensors: Mapping[str, Tensor]) -> Header:
    """Return the header of packed tensors and of those that stand beside them."""
    return Header(list(entries), {name: _digest(tensor) for name, tensor in tensors.items()})


def write_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], out: Path, limit: int = 5 * 10**9
) -> None:
    """Write the safetensors files of a folder, one or as many of at most ``limit`` bytes, and then their index.

    Each appears whole.  Files of an earlier model with other names are removed.
    """
    from safetensors.torch import save_file

    parts: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size > room and parts[-1]:
            parts.append({})
            room = limit
        parts[-1][name] = tensor.contiguous()
        room -= size
    names = [WEIGHTS] if len(parts) == 1 else [_shard(n, len(parts)) for n in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        with replacing(out / name) as path:
            save_file(part, path, dict(metadata))
    for path in [*out.glob("model*.safetensors"), out / INDEX]:
        if path.name not in names:
            path.unlink(missing_ok=True)
    if len(parts) > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write(out / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def find_files(path: Path) -> list[Path]:
    """Return the safetensors files of a folder, or the one that a path names; DataError where there are none."""
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        try:
            return sorted({path / name for name in json.loads((path / INDEX).read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path / INDEX} lists no files ({error}): save the model again") from error
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    raise DataError(f"{path} is no safetensors file and no folder with {WEIGHTS}: give that of a saved model")


def read_tensors(paths: Iterable[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of safetensors files, and the metadata of the first; DataError where one cannot be read."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] | None = None
    for path in paths:
        try:
            with safe_open(str(path), "pt") as file:
                own = dict(file.metadata() or {})
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
            raise DataError(f"{path} cannot be read as safetensors ({_line(error)}): save the model again") from error
        metadata = own if metadata is None else metadata
        if own.get(TEXT) != metadata.get(TEXT):
            raise DataError(f"{path} belongs to another model than the files beside it: pack the model again")
    return tensors, metadata or {}


def read_header(metadata: Mapping[str, str], path: Path) -> Header:
    """Return what the metadata of a file says; DataError where it is not sealed, or of another version."""
    text = metadata.get(TEXT)
    if text is None:
        raise DataError(f"{path} is not packed by s3lab: pack it with `s3lab pack`")
    if _hash(text.encode()) != metadata.get(SEAL):
        raise DataError(f"the header of {path} is not as it was written: the file is damaged, pack the model again")
    with _structured(path):
        told = json.loads(text)
        if told["version"] not in range(1, VERSION + 1):
            raise DataError(
                f"{path} has version {told['version']!r} of the layout and this s3lab reads 1 to {VERSION}: install "
                "the s3lab that packed it, or pack the model again"
            )
        header = Header(list(told["entries"]), dict(told["sha256"]))
        if lost := header.parts - header.sha256.keys():
            raise DataError(f"{path} tells of no {min(lost)}: the file is damaged, pack the model again")
        return header


def read_packed(path: Path, *, whole: bool = True) -> tuple[list[Entry], dict[str, Tensor]]:
    """Return what a packed file or folder holds: the packed weights, and the other tensors by name.

    Every tensor is compared with its SHA-256, and with ``whole`` all must be there; without, a packed weight of which
    another file has a part counts as the tensors that are here.  Raises DataError where anything is
    not as it was written: a file that is cut or changed, a tensor of another name, dtype, shape or content, an unknown
    version.
    """
    files = find_files(path)
    tensors, metadata = read_tensors(files)
    header = read_header(metadata, files[0])
    check_tensors(header, tensors, files[0], whole)
    with _structured(files[0]):
        found = [told for told in header.entries if whole or _parts(told) <= tensors.keys()]
        entries = [Entry.read(told, tensors) for told in found]
        parts = Header(found, {}).parts
    return entries, {name: tensor for name, tensor in tensors.items() if name not in parts}


def check_tensors(header: Header, tensors: Mapping[str, Tensor], path: Path, whole: bool = True) -> None:
    """Raise DataError unless tensors are those that a header tells of, ``whole`` if all of them."""
    for name, tensor in tensors.items():
        if header.sha256.get(name) != _digest(tensor):
            raise DataError(f"{name} in {path} is not as it was written: the file is damaged, pack the model again")
    if whole and (lost := header.sha256.keys() - tensors.keys()):
        raise DataError(f"{path} lacks {min(lost)}: a file is missing or damaged, pack the model again")


@contextmanager
def _structured(path: Path) -> Iterator[None]:
    """Say of a header that is not as s3lab writes it that it is not."""
    try:
        yield
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"the header of {path} is not as s3lab writes it ({_line(error)}): pack the model again"
        ) from error


def _parts(told: Mapping[str, Any]) -> set[str]:
    """The names of the tensors of an entry."""
    names = list(told["names"].values())
    kinds = ["values", *(["scales"] if told["values"] != "same" else []), *(Wraps._fields if told.get("wrap") else [])]
    return {f"{name}.{kind}" for name in names for kind in kinds} | {f"{names[0]}.index"}


def _read_wraps(told: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Wraps:
    """The blocks around the one weight of an entry; DataError where they do not fit it."""
    ((key, name),) = told["names"].items()
    block, found = int(told["wrap"]), []
    for side, size in zip(Wraps._fields, told["shapes"][key], strict=True):
        blocks, shape = tensors[f"{name}.{side}"], (int(size) // block, block, block)
        if blocks.dtype != dtype or tuple(blocks.shape) != shape or shape[0] * block != size:
            raise DataError(
                f"{name}.{side} is {blocks.dtype} of shape {tuple(blocks.shape)}: expected {dtype}, {shape}"
            )
        found.append(blocks)
    return Wraps(*found)


def _expect(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    found = tensors[name]
    if found.ndim != 1 or found.dtype != dtype:
        raise DataError(f"{name} is {found.dtype} of shape {tuple(found.shape)} where a row of {dtype} was packed")
    return found


def _digest(tensor: Tensor) -> str:
    told = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ".encode()
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return _hash(told, data.numpy().data)


def _hash(*parts: bytes | memoryview) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _shard(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
