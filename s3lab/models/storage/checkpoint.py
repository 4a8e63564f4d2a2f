"""A pruned model as a Hugging Face directory, with the record of its run and a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s3lab.algebra.patterns import parse
from s3lab.errors import DataError
from s3lab.files import replacing, telling, write
from s3lab.folder import check_folder
from s3lab.models.prune.sequential import Run
from s3lab.models.prune.shrink import Shrunk
from s3lab.models.prune.wrapped import find_parts, name_parts
from s3lab.models.search.allocate import Allocation
from s3lab.models.structure.decoder import find_decoder
from s3lab.packing.file import read_tensors
from s3lab.solvers.wrap import Wrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "s3lab.json"
PARTS = "wraps.safetensors"


def save_pruned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: str | Path,
    run: Run,
    shrunk: Shrunk | None = None,
    budget: Allocation | None = None,
) -> Path:
    """Save a pruned model so that transformers loads it as any other, and return the folder ``out``.

    Beside weights, configuration and tokenizer stand ``s3lab.json``, the settings of the run and all its rows, and
    ``README.md``, the model card, both with what `shrink` did and how `allocate` chose, if that is given.  Every file
    appears whole, the configuration last.  Of wrapped matrices ``wraps.safetensors`` holds the parts, in the dtype of
    the model, which then has the products of these.  Raises DataError for a folder with files that s3lab did not make.
    """
    out = Path(out)
    check_folder(out)
    _save_parts(model, run, out / PARTS)
    save_model(model, tokenizer, out)
    rows = {"layers": run.layers, "matrices": run.matrices}
    told = {"shrunk": shrunk and asdict(shrunk), "budget": budget and budget.record}
    record = {**run.manifest, "density": run.density, **told, **rows}
    write_record(out, record, write_card(run, shrunk, budget))
    return out


def read_parts(folder: Path) -> dict[str, Wrapped]:
    """Read the parts of the wrapped matrices of a pruned model, by full name: none where nothing is wrapped."""
    path = folder / PARTS
    return find_parts(read_tensors([path])[0]) if path.exists() else {}


def _save_parts(model: PreTrainedModel, run: Run, path: Path) -> None:
    if not run.wrapped:
        path.unlink(missing_ok=True)
        return
    from safetensors.torch import save_file

    matrices = {name: matrix for layer in find_decoder(model).matrices for name, matrix in layer.items()}
    stored = {
        name: found.to(matrices[name].weight)
        for name, found in run.wrapped.items()
        if found.core.shape == matrices[name].weight.shape  # not taken apart since, as by `shrink`
    }
    with torch.no_grad():
        for name, found in stored.items():
            matrices[name].weight.copy_(found.dense)
    with replacing(path) as part, telling(path):
        save_file({name: tensor.contiguous() for name, tensor in name_parts(stored).items()}, part)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: Path) -> None:
    """Save model and tokenizer as transformers does, every file whole, the configuration last."""
    begun = out / ".model.s3lab.part"
    try:
        with telling(out):
            model.save_pretrained(begun)
        if tokenizer is not None:
            tokenizer.save_pretrained(begun)
        for path in sorted(begun.iterdir(), key=lambda path: path.name == "config.json"):
            with replacing(out / path.name) as part:
                path.replace(part)
    finally:
        shutil.rmtree(begun, ignore_errors=True)


def write_record(out: Path, record: Mapping[str, Any], card: str) -> None:
    """Write the record of a model and its card into a folder."""
    write(out / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    write(out / "README.md", card.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read the record or the settings of a pruned model; DataError where there are none."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): give the folder of a model that s3lab pruned") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no settings: give the folder of a model that s3lab pruned")
    return found


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a pruned model; DataError where there is none, or the model is packed already."""
    record, config = read_json(folder / RECORD), read_json(folder / "config.json")
    if "quantization_config" in config:
        raise DataError(f"{folder} holds a packed or quantised model: give the folder of a pruned one")
    if not isinstance(record.get("matrices"), list):
        raise DataError(f"{folder / RECORD} is no record of a pruned model: prune the model again")
    return record


def group_rows(matrices: Sequence[Mapping[str, Any]], where: str) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield each spec of a record with the rows of the matrices it pruned together, in the order of its names.

    Raises DataError for rows that are none, naming ``where`` they stand.
    """
    try:
        at = 0
        while at < len(matrices):
            spec = matrices[at]["spec"]
            count = len(parse(spec).names) or 1
            together = list(matrices[at : at + count])
            if len(together) < count or any(row["spec"] != spec for row in together):
                raise ValueError(f"{spec} is of {count} matrices")
            yield spec, together
            at += count
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is no record of a pruned model ({error}): prune the model again") from error


def write_card(run: Run, shrunk: Shrunk | None = None, budget: Allocation | None = None) -> str:
    """Return the model card of a run, in Markdown."""
    settings, facts = run.manifest["settings"], run.manifest["facts"]
    stored = "Whole parts that were zero are taken out" if shrunk else "Zeros are stored"
    left = sum(row["density"] == 1 for row in run.matrices)
    about = {
        "Pattern": _told(settings["spec"] if budget is None else budget.facts["family"]),
        **({} if budget is None else {"Budget": budget}),
        "Solver": _told(settings["solver"]),
        "Weights kept": f"{run.density:.1%} of {len(run.matrices)} matrices" + (f", {left} left dense" if left else ""),
        "Calibration": f"{facts['calibration_tokens']} tokens in sequences of {facts['length']}",
        "Damping": settings["damp"],
        "Second moments": f"of the {settings['hessians']} model"
        + (", weighted by the dense model's loss" if settings.get("hessian") == "loss" else ""),
        **{key.capitalize(): value for key, value in facts["provenance"].items()},
        **({"Shrunk": shrunk} if shrunk else {}),
    }
    columns = [key for key in run.layers[-1] if key not in ("layer", "time_s")]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in run.matrices:
        kinds.setdefault(row["name"].rstrip("0123456789").rstrip("."), []).append(row)
    measures = ("error", "error_test", "weight_error", "density")
    errors = [[kind, *(_mean(rows, key) for key in measures)] for kind, rows in kinds.items()]
    parts = (
        "---\nlibrary_name: transformers\ntags:\n- s3lab\n- pruning\n- sparsity\n---",
        f"# {settings['model']}, pruned",
        f"Pruned decoder layer by decoder layer with s3lab.  {stored}, so that transformers loads it "
        f"as any other model; all figures are in `{RECORD}`.",
        write_table(["", ""], [[key, value] for key, value in about.items()]),
        "Relative output error by kind of matrix, mean over the layers, on calibration and on held-out tokens:",
        write_table(["matrix", "error", "held out", "weight error", "density"], errors),
        "The model after each decoder layer:",
        write_table(["layer", *columns], [[row["layer"], *(row.get(key) for key in columns)] for row in run.layers]),
    )
    return "\n\n".join(parts) + "\n"


def _told(table: dict[str, str]) -> str:
    only = list(table) == ["*"]
    return ", ".join(f"`{value}`" if only else f"`{glob}`: `{value}`" for glob, value in table.items())


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return sum(values) / len(values) if values else None


def write_table(head: list[str], rows: list[list[Any]]) -> str:
    """Return a table in Markdown; None is an empty cell."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [head, ["---"] * len(head), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
