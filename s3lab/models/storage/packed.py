"""A pruned model's folder as a packed one, and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from s3lab.algebra.patterns import parse
from s3lab.errors import DataError, SpecError
from s3lab.files import write
from s3lab.models.storage.checkpoint import PARTS, RECORD, group_rows, read_json, read_parts, read_record
from s3lab.models.storage.quantizer import METHOD
from s3lab.packing.codec import ALONE, bind, pack
from s3lab.packing.file import (
    INDEX,
    VERSION,
    Entry,
    find_files,
    read_packed,
    read_tensors,
    seal,
    write_tensors,
)
from s3lab.packing.values import Kind
from s3lab.solvers.wrap import Wrapped

CONFIG = "config.json"
_NEAR = 1e-2  # of its norm: a product that was rounded on another machine is nearer, one that was trained is not


def pack_model(folder: str | Path, out: str | Path, *, values: Kind = "same", group: int = 128) -> dict[str, str]:
    """Pack a pruned model of ``folder`` into ``out``, and return why matrices of its record were left dense, by name.

    The record ``s3lab.json``, as `save_pruned` writes it, says which matrices were pruned by which spec.  Matrices that
    the run or `shrink` left dense stay so, and of wrapped ones the core is packed, from ``wraps.safetensors``.
    ``values`` and ``group`` are those of `codec.pack`.  The new folder loads by
    ``AutoModelForCausalLM.from_pretrained`` after ``import s3lab``; the files beside the weights are copied.

    Raises DataError for a folder without record, weights or config, or one that is packed already, SpecError for a
    matrix that is not pruned as the record says.
    """
    folder, out = Path(folder), Path(out)
    record, config = read_record(folder), read_json(folder / CONFIG)
    tensors, _ = read_tensors(find_files(folder))
    wrapped = read_parts(folder)
    entries: list[Entry] = []
    dense: dict[str, str] = {}
    for spec, rows in group_rows(record["matrices"], str(folder / RECORD)):
        found = _find(spec, rows, tensors)
        if isinstance(found, str):
            dense |= {f"layer {row['layer']} {row['name']}": found for row in rows}
            continue
        keys, ways, changed = found
        if "extra" in rows[0]:
            entry = _pack_wrapped(spec, keys[ALONE], ways, tensors, wrapped, values, group)
            if isinstance(entry, str):
                dense[keys[ALONE]] = entry
            else:
                entries.append(entry)
            continue
        try:
            entries.append(_pack(spec, keys, ways, tensors, values, group))
        except SpecError as error:
            if not changed:
                raise SpecError(f"{' & '.join(keys.values())}: {error}") from error
            dense |= {name: "of another shape than it was pruned in" for name in keys.values()}
    taken = {f"{name}.weight" for entry in entries for name in entry.names.values()}
    stored = {name: tensor for name, tensor in tensors.items() if name not in taken}
    for entry in entries:
        stored |= entry.tensors()
    config["quantization_config"] = {"quant_method": METHOD, "version": VERSION}
    _save(folder, out, stored, seal([entry.describe() for entry in entries], stored).write(), config)
    return dense


def unpack_model(folder: str | Path, out: str | Path) -> None:
    """Write the model of a packed folder as a dense one, every weight as it was before, into ``out``.

    Where values were rounded, the weights are the rounded ones.  Raises DataError as `file.read_packed` does.
    """
    folder, out = Path(folder), Path(out)
    config = read_json(folder / CONFIG)
    entries, tensors = read_packed(folder)
    config.pop("quantization_config", None)
    for entry in entries:
        tensors |= entry.unpack()
    _save(folder, out, tensors, {"format": "pt"}, config)


def _pack(
    spec: str,
    keys: dict[str, str],
    ways: list[frozenset[str]],
    tensors: Mapping[str, Tensor],
    values: Kind,
    group: int,
) -> Entry:
    """The matrices of ``keys`` packed, those of the first of ``ways`` that fits taken to be stored (K, M)."""
    stored = {key: tensors[f"{name}.weight"] for key, name in keys.items()}
    errors = []
    for turned in ways:
        weights = {key: W.T if keys[key] in turned else W for key, W in stored.items()}
        try:
            return Entry(pack(weights.get(ALONE, weights), spec, values=values, group=group), keys, turned)
        except SpecError as error:
            errors.append(error)
    raise errors[0]


def _pack_wrapped(
    spec: str,
    name: str,
    ways: list[frozenset[str]],
    tensors: Mapping[str, Tensor],
    wrapped: Mapping[str, Wrapped],
    values: Kind,
    group: int,
) -> Entry | str:
    """A wrapped matrix packed, or why not: its parts are not there, or what is stored is no product of them."""
    if name not in wrapped:
        return f"wrapped, and {PARTS} does not have its parts"
    found = wrapped[name]
    product = found.dense
    for turned in ways:
        W = tensors[f"{name}.weight"]
        W = W.T if name in turned else W
        if W.shape == product.shape and (W - product).norm() <= _NEAR * product.norm():
            return Entry(pack(found.core, spec, values=values, group=group), {ALONE: name}, turned, found.wraps)
    return f"no longer the product of its parts in {PARTS}"


def _find(
    spec: str, rows: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]
) -> str | tuple[dict[str, str], list[frozenset[str]], bool]:
    """The names of the matrices of rows by those of their spec, which may be stored (K, M), and if a shape is another.

    Or why they stay dense.  A square does not tell which way round it is stored.
    """
    pattern = parse(spec)
    own = dict(zip(pattern.names or (ALONE,), rows, strict=True))
    shapes = {key: (row["shape"][0], row["shape"][1]) for key, row in own.items()}
    if all(row["density"] == 1 for row in rows) and bind(pattern, shapes).density < 1:
        return "left dense by the run"
    keys, turned, square, changed = {}, set(), set(), False
    for key, row in own.items():
        end = f".{row['layer']}.{row['name']}.weight"
        names = [name for name in tensors if f".{name}".endswith(end) and tensors[name].ndim == 2]
        if len(names) != 1:
            return "not stored as one matrix"
        keys[key] = names[0].removesuffix(".weight")
        shape = list(tensors[names[0]].shape)
        if shape != row["shape"] and shape[::-1] == row["shape"]:
            turned.add(keys[key])
        if shape == shape[::-1]:
            square.add(keys[key])
        changed |= sorted(shape) != sorted(row["shape"])
    return keys, [frozenset(turned), *([frozenset(turned | square)] if square else [])], changed


def _save(
    folder: Path, out: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """Write a model into a folder, and beside it what else stands in the old one; the config last."""
    if out.resolve() == folder.resolve():
        raise DataError(f"{out} is the model itself: give another folder")
    write_tensors(tensors, metadata, out)
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (CONFIG, INDEX):
            shutil.copyfile(path, out / path.name)
    write(out / CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
