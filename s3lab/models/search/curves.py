"""What each rung of each ladder loses: one cheap solve each, on second moments of the dense model, kept in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from s3lab.errors import DataError
from s3lab.files import replacing, telling, write
from s3lab.models.prune.layerwise import Recipe, prune_measured
from s3lab.models.prune.moments import read_moments
from s3lab.models.search.ladder import Ladder, Rung
from s3lab.models.structure.decoder import Decoder
from s3lab.solvers.base import Solver
from s3lab.tensors.processes import SOLO


@dataclass(frozen=True)
class Curves:
    """Solves of single rungs, in files of ``folder`` named by all that they depend on, so that none is made twice.

    ``moments`` are the files of `moments.keep_moments`, ``source`` what tells them from others.  ``options`` are those
    of `layerwise.Recipe`.  ``tell`` hears the layer and the spec of each solve, made now or found.  With ``kept`` the
    pruned weights are stored as well, for `load`.
    """

    decoder: Decoder
    ladders: Sequence[Ladder]
    moments: Sequence[Path]
    source: Mapping[str, Any]
    folder: Path
    solver: Solver
    options: Mapping[str, Any] = field(default_factory=dict)
    kept: bool = False
    tell: Callable[[int, str], object] = lambda layer, text: None

    def measure(self) -> list[list[float]]:
        """Return the relative output error of each rung of each ladder, 0 where dense: of a coupling √Σ error² of
        those that lead.

        Raises DataError for a matrix that saw too few tokens to be pruned.
        """
        found: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
        for layer, text in self.solves:
            rows = self._solve(layer, text)
            self.tell(layer, text)
            found[layer, text] = {f"{self.decoder.name}.{layer}.{row['name']}": row for row in rows}

        def read(ladder: Ladder, rung: Rung) -> float:
            if rung.job is None:
                return 0.0
            rows = [found[ladder.layer, rung.text][name] for name in ladder.weights]
            if dense := [row for row in rows if "left dense" in row["note"]]:
                raise DataError(
                    f"{ladder.glob} cannot be budgeted ({dense[0]['note']}): give more text, min_tokens or scarce, or "
                    "a table of families in which it is dense"
                )
            return sum(row["error"] ** 2 for row in rows if row["error"] is not None) ** 0.5

        return [[read(ladder, rung) for rung in ladder.rungs] for ladder in self.ladders]

    def load(self, ladder: Ladder, rung: int) -> dict[str, Tensor]:
        """Return the weights of a ladder's matrices as a rung's solve left them, by name; `measure` comes first."""
        from safetensors import safe_open

        path = self._place(ladder.layer, ladder.rungs[rung].text).with_suffix(".safetensors")
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in ladder.weights}

    @property
    def solves(self) -> list[tuple[int, str]]:
        """Every layer with each spec that a ladder in it has."""
        found = {(ladder.layer, rung.text): None for ladder in self.ladders for rung in ladder.rungs if rung.job}
        return sorted(found, key=lambda solve: solve[0])

    def _solve(self, layer: int, text: str) -> list[dict[str, Any]]:
        """The rows of all matrices of a layer whose ladders have a spec, from its file, or solved now."""
        place = self._place(layer, text)
        rows, weights = place.with_suffix(".json"), place.with_suffix(".safetensors")
        if rows.exists() and (weights.exists() or not self.kept):
            return json.loads(rows.read_bytes())
        jobs = [rung.job for rung in self._rungs(layer, text) if rung.job]
        recipe = Recipe(
            [jobs if index == layer else [] for index in range(len(self.decoder.layers))],
            {matrix.name: self.solver for job in jobs for matrix in job.matrices.values()},
            **self.options,
        )
        matrices = {matrix.name: matrix for job in jobs for matrix in job.matrices.values()}
        dense = {name: matrix.weight.clone() for name, matrix in matrices.items()}
        with torch.no_grad():
            try:
                measured = read_moments(self.moments[layer])
                found = prune_measured(self.decoder, layer, measured, recipe, SOLO, lambda name, error: None).rows
                if self.kept:
                    _save(weights, {name: matrix.weight for name, matrix in matrices.items()})
            finally:
                for name, W in dense.items():
                    matrices[name].weight.copy_(W)
        write(rows, json.dumps(found).encode())
        return found

    def _rungs(self, layer: int, text: str) -> list[Rung]:
        return [rung for one in self.ladders if one.layer == layer for rung in one.rungs if rung.text == text]

    def _place(self, layer: int, text: str) -> Path:
        """The name of a solve's files, but for the suffix."""
        names = [[*ladder.weights] for ladder in self.ladders if ladder.layer == layer]
        told = [dict(self.source), repr(self.solver), {k: repr(v) for k, v in self.options.items()}, text, names]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]
        return self.folder / f"{layer:03}" / digest


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with replacing(path) as part, telling(path):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
