"""What a pruned model is pruned by: which matrices, under which spec, with which masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from s3lab.algebra.couple import Coupled
from s3lab.algebra.patterns import parse
from s3lab.algebra.spec import Pattern
from s3lab.errors import DataError, SpecError
from s3lab.models.storage.checkpoint import group_rows
from s3lab.models.structure.decoder import find_decoder
from s3lab.packing.codec import ALONE, pack


@dataclass(frozen=True, eq=False)
class Target:
    """Matrices of a model that one spec pruned together, and their masks (M, K), by full name."""

    spec: Pattern
    masks: dict[str, Tensor]


def find_targets(model: nn.Module, matrices: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Return what the rows of a pruning run say is pruned in a model.

    A mask is what is not zero, and of the zeros as many more as the spec asks for.  Matrices that were left dense, and
    those that `shrink` made smaller, are no targets.  Raises DataError for rows of another model or of something else
    than linear layers, and where nothing is a target; SpecError for a weight that breaks its spec.
    """
    decoder, targets = find_decoder(model), []
    every = {name: matrix for found in decoder.matrices for name, matrix in found.items()}
    for text, rows in group_rows(matrices, "what is to be tuned"):
        names = [f"{decoder.name}.{row['layer']}.{row['name']}" for row in rows]
        if missing := [name for name in names if name not in every]:
            raise DataError(f"{type(model).__name__} has no matrix {missing[0]}: give the record of this model's run")
        if others := [name for name in names if not isinstance(every[name].module, nn.Linear)]:
            kind = type(every[others[0]].module).__name__
            raise DataError(f"{others[0]} is kept by a {kind}: tuning is of linear layers, torch.nn.Linear, alone")
        weights = {name: every[name].weight for name in names}
        smaller = any(list(W.shape) != list(row["shape"]) for W, row in zip(weights.values(), rows, strict=True))
        if not smaller and any(row["density"] < 1 for row in rows):
            targets.append(_find_masks(parse(text), weights))
    if not targets:
        raise DataError("no matrix is pruned, or all were made smaller since: train such a model as any dense one")
    return targets


def _find_masks(spec: Pattern, weights: dict[str, Tensor]) -> Target:
    if isinstance(spec, Coupled):
        spec = spec.rename(dict(zip(spec.names, weights, strict=True)))
    masks = {name: W != 0 for name, W in weights.items()}
    try:
        spec.check(masks if isinstance(spec, Coupled) else next(iter(masks.values())))  # pyright: ignore
    except SpecError:  # there are zeros among what is kept, and which ones the codec finds
        (name, W), *_ = weights.items()
        try:
            found = pack(weights if isinstance(spec, Coupled) else W, spec).masks()
        except SpecError as error:
            raise SpecError(f"{' & '.join(weights)}: {error}") from error
        masks = found if isinstance(spec, Coupled) else {name: found[ALONE]}
    return Target(spec, masks)
