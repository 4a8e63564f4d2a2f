"""What surrounds a mask: each ingredient alone, each left out, and all together; finished rows are kept."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pandas import DataFrame
from torch import Tensor

import s3lab
from s3lab.algebra.patterns import parse
from s3lab.errors import DataError
from s3lab.lab.run.fresh import hash_source
from s3lab.lab.study.bits import count_bits
from s3lab.lab.study.interval import find_interval
from s3lab.lab.study.recall import recall
from s3lab.models.basis.permute import permute
from s3lab.models.basis.rotate import rotate
from s3lab.models.prune.sequential import prune_model
from s3lab.models.search.allocate import allocate
from s3lab.models.structure.decoder import find_decoder
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.reference import perplexity
from s3lab.packing.codec import ALONE, pack
from s3lab.packing.values import Kind
from s3lab.solvers.wrap import Wrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENSE, PLAIN = "dense", "plain"
INGREDIENTS = ("rotate", "permute", "budget", "loss", "wrap")  # in the order in which they are put to work
TOGETHER = ("rotate", "permute", "budget", "wrap")  # the loss lowers no perplexity, and is tried alone


def list_stacks(ingredients: Sequence[str] = TOGETHER) -> dict[str, tuple[str, ...]]:
    """Return the stacks of a study by name: none of the ingredients, each alone, each left out, and all of them.

    >>> list_stacks(("budget", "loss"))
    {'plain': (), 'budget': ('budget',), 'loss': ('loss',), 'all': ('budget', 'loss')}
    """
    whole = tuple(ingredients)
    found = {PLAIN: (), **{one: (one,) for one in whole}}
    left = {f"all but {one}": tuple(other for other in whole if other != one) for one in whole}
    return found | {name: stack for name, stack in left.items() if len(stack) > 1} | {"all": whole}


@dataclass(frozen=True)
class Stacking:
    """What all rows share: a model, texts by name, each a source to calibrate on and one to measure on, and sizes.

    The first text calibrates, in ``sequences`` of ``length`` tokens, and ``windows`` of each measure.  ``rotation`` is
    a kind of `rotate`, ``order`` the score of `permute`, ``method`` one of `allocate`, by SparseGPT's errors whatever
    ``solver`` prunes, ``block`` the size of the blocks around a wrapped core.  Second
    moments are the dense model's, and shared by all rows of the same basis and seed.
    What is finished is kept in ``folder``.
    """

    model: str
    texts: Mapping[str, Sequence[str]]
    folder: str | Path
    dtype: str = "bfloat16"
    solver: str = "sparsegpt"
    rotation: str = "learned"
    order: str = "wanda"
    method: str = "loss"
    block: int = 16
    sequences: int = 128
    windows: int = 40
    length: int = 512
    damp: float = 1e-2
    device: str = "cpu"

    def rows(
        self, families: Mapping[str, str], stacks: Mapping[str, Sequence[str]], seeds: Sequence[int]
    ) -> Iterator[dict[str, Any]]:
        """Yield a row for each seed, pattern and stack.

        ``families`` gives each pattern the family that budgets choose from, within the bytes of the pattern.  A row
        tells ``<text>_perplexity`` of each text, ``bits`` a weight of the matrices in the dtype of the model, with the
        index and what surrounds a core, the mean error of the matrices in per cent, and the seconds that pruning took.
        Raises DataError for an ingredient that is not there.
        """
        if unknown := {one for stack in stacks.values() for one in stack} - set(INGREDIENTS):
            raise DataError(f"no ingredients are called {sorted(unknown)}: use {', '.join(INGREDIENTS)}")
        for seed in seeds:
            for pattern, family in families.items():
                for name, stack in stacks.items():
                    told = {"pattern": pattern, "family": family, "stack": list(stack), "seed": seed}

                    def make(told: dict[str, Any] = told, name: str = name) -> dict[str, Any]:
                        return {"pattern": told["pattern"], "stack": name, "seed": told["seed"], **self._prune(**told)}

                    yield recall(self.folder, self._key | told, make) | {"stack": name}

    def rivals(self, kinds: Sequence[Kind], smaller: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield a row for the dense model, for it with its weights rounded in each way, and for smaller dense ones.

        ``bits`` of a smaller model are those that the matrices of the dense one would have, were it as large with all
        the rest that it has.
        """
        for name in (DENSE, *kinds, *smaller):

            def make(name: str = name) -> dict[str, Any]:
                model, bits = self._make_rival(name, name in kinds)
                return {"stack": name, "bits": bits, **self._measure(model)}

            yield recall(self.folder, self._key | {"rival": name}, make)

    @property
    def _key(self) -> dict[str, Any]:
        home = Path(s3lab.__file__).parent
        floors = ("algebra", "tensors", "solvers", "models/basis", "models/search")
        source = [hash_source(home / floor) for floor in floors]
        return {**{key: value for key, value in asdict(self).items() if key != "folder"}, "source": source}

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_model(self.model, self.dtype, self.device)

    def _prune(self, pattern: str, family: str, stack: Sequence[str], seed: int) -> dict[str, Any]:
        dense, tokenizer = self._loaded
        model, began, specs = deepcopy(dense), time.perf_counter(), pattern
        text = next(iter(self.texts.values()))[0]
        ids = corpus.tokens(tokenizer, "calibration", self.length, self.sequences, seed, text).to(self.device)
        basis = [name for name in stack if name in ("rotate", "permute")]
        if "rotate" in stack:
            rotate(model, self.rotation, ids, seed=seed)  # type: ignore[arg-type]
        if "permute" in stack:
            permute(model, pattern, self.order, ids, seed=seed)  # type: ignore[arg-type]
        known = sha256(json.dumps([basis, pattern if basis else "", seed]).encode()).hexdigest()[:12]
        moments = Path(self.folder) / f"moments-{known}"
        common: dict[str, Any] = {"calibration": ids, "damp": self.damp, "seed": seed, "progress": False}
        if "budget" in stack:
            share = self._count_bits(pattern) / self._weight_bits
            specs = allocate(model, family, share, self.method, moments=moments, **common)
        weighted = "loss" in stack
        run = prune_model(
            model,
            None,
            specs,
            self.solver,
            wrap=Wrap(block=self.block) if "wrap" in stack else None,
            hessians="dense",
            hessian="loss" if weighted else "inputs",
            moments=moments.with_name(moments.name + "-loss") if weighted else moments,
            **common,
        )
        errors = [row["error_test"] for row in run.matrices]
        pruned_s = time.perf_counter() - began
        left = sum(map(prod, self._shapes)) - sum(prod(row["shape"]) for row in run.matrices)
        alone = [{"spec": DENSE, "shape": (1, left), "density": 1.0}] if left else []  # what a budget leaves dense
        figures = {
            "bits": count_bits([*run.matrices, *alone], self._weight_bits),
            "error_test_percent": 100 * sum(errors) / len(errors),
        }
        return figures | self._measure(model) | {"time_s": pruned_s}

    @property
    def _weight_bits(self) -> int:
        return 8 * self._loaded[0].dtype.itemsize

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        weights = [matrix.weight for layer in find_decoder(self._loaded[0]).matrices for matrix in layer.values()]
        return [(weight.shape[0], weight.shape[1]) for weight in weights]

    def _count_bits(self, pattern: str) -> float:
        """The bits a weight that a pattern takes on all matrices."""
        spec = parse(pattern)
        return count_bits(
            [{"spec": pattern, "shape": s, "density": spec.bind(s).density} for s in self._shapes], self._weight_bits
        )

    def _make_rival(self, name: str, rounded: bool) -> tuple[PreTrainedModel, float]:
        dense, _ = self._loaded
        if name == DENSE:
            return dense, float(self._weight_bits)
        if not rounded:
            model, _ = load_model(name, self.dtype, self.device)
            matrices = sum(map(prod, self._shapes))
            rest = _count(dense) - matrices
            return model, self._weight_bits * (_count(model) - rest) / matrices
        model, bits, weights = deepcopy(dense), 0.0, 0
        for layer in find_decoder(model).matrices:
            for matrix in layer.values():
                packed = pack(matrix.weight, "1:1", values=name)  # type: ignore[arg-type]
                with torch.no_grad():
                    matrix.weight.copy_(packed.unpack_one(ALONE))
                bits, weights = bits + packed.theory_bits * packed.weights, weights + packed.weights
        return model, bits / weights

    def _measure(self, model: PreTrainedModel) -> dict[str, Any]:
        found = {}
        for name, (_, test) in self.texts.items():
            ids: Tensor = corpus.tokens(self._loaded[1], "test", self.length, self.windows, 0, test)
            found[f"{name}_perplexity"] = perplexity(model, ids.to(self.device))
        return found


def find_cuts(rows: DataFrame, dense: Mapping[str, float], columns: Sequence[str]) -> DataFrame:
    """Return by how many per cent each stack cuts the rise of perplexity of the plain pattern, on each text.

    ``dense`` are the dense model's figures in ``columns``.  Each seed is compared with the same; there are the mean
    and, over several seeds, the ends of its interval of 95 %.

    >>> rows = DataFrame({"pattern": "2:4", "seed": 0, "stack": ["plain", "all"], "a_perplexity": [30.0, 25.0]})
    >>> find_cuts(rows, {"a_perplexity": 20.0}, ["a_perplexity"])["cut_percent"].tolist()
    [50.0]
    """
    found = []
    for column in columns:
        rise = rows.set_index(["pattern", "stack", "seed"])[column].sort_index() - dense[column]
        for pattern, stack in dict.fromkeys(zip(rows["pattern"], rows["stack"], strict=True)):
            if stack != PLAIN:
                cuts = (100 * (1 - rise.loc[pattern, stack] / rise.loc[pattern, PLAIN])).tolist()
                mean, half = find_interval(cuts) if len(cuts) > 1 else (cuts[0], float("nan"))
                told = {"pattern": pattern, "stack": stack, "text": column.removesuffix("_perplexity")}
                found.append({**told, "cut_percent": mean, "low": mean - half, "high": mean + half, "seeds": len(cuts)})
    return DataFrame(found)


def _count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
