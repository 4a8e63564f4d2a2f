"""A small language model trained from nothing under patterns: held-out perplexity, and how its masks move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

import s3lab
from s3lab.algebra.patterns import parse
from s3lab.errors import DataError
from s3lab.lab.run.fresh import hash_source
from s3lab.lab.study.interval import find_interval
from s3lab.lab.study.recall import recall
from s3lab.models.prune.sequential import prune_model
from s3lab.models.structure.decoder import find_decoder
from s3lab.models.text import corpus
from s3lab.models.text.pretraining import Pretraining, Recipe, build, make_optimizer, train_tokenizer
from s3lab.models.text.reference import perplexity
from s3lab.training import Fixed, Gradual, Method, RigL, Sparsity, make_method, sparse

if TYPE_CHECKING:
    from pandas import DataFrame
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENSE, STATIC, ONE_SHOT = "dense", "static", "one-shot"
Equal = Literal["steps", "operations"]
_CORNER = 16, 32


@dataclass(frozen=True)
class Scratch:
    """What all runs share: a recipe, and a folder for what is finished.

    Methods are those of `s3lab.training` by name, "dense", "static", a random mask that stays, and "one-shot": dense
    for half of the steps, pruned by ADMM, and tuned under its mask for the rest, at ``rewind`` times the rate.  The
    masks of "gradual" and "rigl" move until three quarters of the steps are over, 30 times.
    """

    recipe: Recipe
    folder: str | Path
    rewind: float = 0.5

    def runs(
        self, pairs: Sequence[tuple[str, str]], seeds: Sequence[int], equal: Equal = "steps"
    ) -> Iterator[dict[str, Any]]:
        """Yield what came of each pattern and method with each seed: ``rows``, a row a measurement, and a ``mask``.

        The pattern of "dense" is "dense".  Rows tell ``step``, ``operations`` so far by those that a dense run takes in
        all, held-out ``perplexity``, and ``churn``: the share of the kept weights that were not kept at the row before.
        With ``equal`` "operations" a run takes as many steps more as its operations are fewer.  The ``mask`` is a
        corner of that of the first matrix of the last layer, None of "dense".
        """
        if equal not in get_args(Equal):
            raise DataError(f"equal={equal!r}: runs are of equal {' or '.join(get_args(Equal))}")
        source = [hash_source(Path(s3lab.__file__).parent / floor) for floor in ("algebra", "solvers", "training")]
        for seed in seeds:
            for pattern, method in pairs:
                told = {"pattern": pattern, "method": method, "seed": seed, "equal": equal}
                key = {**told, "recipe": asdict(self.recipe), "rewind": self.rewind, "source": source}
                found = recall(self.folder, key, lambda t=told: self._run(**t))
                yield {**found, "rows": [{**told, **row} for row in found["rows"]]}

    def cost(self, pattern: str, method: str) -> float:
        """Return the operations of a step by those of a dense one, were no time spent on zeros.

        Forward and back, each weight that is kept takes two products a token, its gradient one more; a straight-through
        estimator wants that of all, RigL in each step in which it exchanges.  Attention is left out.
        """
        if method == DENSE:
            return 1.0
        if method == ONE_SHOT:
            return (1 + self.cost(pattern, "fixed")) / 2
        matrices = [m.weight for layer in find_decoder(self._model(0)).matrices for m in layer.values()]
        kept, size = (
            sum(f(W) for W in matrices) for f in (lambda W: self._density(pattern, W) * W.numel(), Tensor.numel)
        )
        density = kept / size
        forward, gradient = density, 1.0 if method in ("ste", "srste", "proximal") else density
        steps = self.recipe.steps
        made = self._make(method, steps)
        if isinstance(made, Gradual):
            forward = gradient = sum(made.density(density, step) for step in range(steps)) / steps
        if isinstance(made, RigL):
            gradient += (1 - density) * made.steps / made.every / steps
        head = self.recipe.vocab * self.recipe.hidden
        return (size * (2 * forward + gradient) / 3 + head) / (size + head)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of all runs."""
        return train_tokenizer(self.recipe)

    @cached_property
    def texts(self) -> tuple[Tensor, Tensor]:
        """The tokens to learn from (n,), and the windows (N, L) to measure on."""
        recipe = self.recipe
        stream = corpus.tokens(self.tokenizer, "train", 1).flatten()
        return stream, corpus.tokens(self.tokenizer, "test", recipe.length, recipe.windows, seed=0)

    def _model(self, seed: int) -> PreTrainedModel:
        return build(replace(self.recipe, seed=seed))

    def _density(self, pattern: str, W: Tensor) -> float:
        return parse(pattern).bind((W.shape[0], W.shape[1])).density

    def _make(self, method: str, steps: int) -> Method:
        until, every = max(1, round(0.75 * steps)), max(1, steps // 40)
        named: dict[str, Method] = {
            "gradual": Gradual(steps=until, every=every),
            "rigl": RigL(steps=until, every=every),
            STATIC: Fixed(),
        }
        return named.get(method) or make_method(method)

    def _run(self, pattern: str, method: str, seed: int, equal: Equal) -> dict[str, Any]:
        cost = self.cost(pattern, method)
        steps = round(self.recipe.steps / cost) if equal == "operations" else self.recipe.steps
        recipe, model = replace(self.recipe, seed=seed, steps=steps), self._model(seed)
        generator = torch.Generator().manual_seed(seed)
        rows: list[dict[str, Any]] = []
        if method == ONE_SHOT:
            half = replace(recipe, steps=steps // 2)
            rows = self._learn(half, model, None, 1.0)
            stream = self.texts[0]
            ids = stream[: len(stream) // recipe.length * recipe.length].view(-1, recipe.length)
            ids = ids[torch.randperm(len(ids), generator=generator)[:64]]
            prune_model(model, None, pattern, "admm", calibration=ids, progress=False)
            tuned = replace(recipe, steps=steps - half.steps, lr=self.rewind * recipe.lr)
            sparsity = _sparse(model, pattern, Fixed(), seed)
            at = rows[-1] if rows else {"step": 0, "operations": 0.0}
            for row in self._learn(tuned, model, sparsity, self.cost(pattern, "fixed")):
                rows.append(
                    {**row, "step": at["step"] + row["step"], "operations": at["operations"] + row["operations"]}
                )
        else:
            sparsity = None
            if method != DENSE:
                masks = _draw(model, pattern, generator) if method == STATIC else None
                sparsity = _sparse(model, pattern, self._make(method, steps), seed, masks)
            rows = self._learn(recipe, model, sparsity, cost)
        mask = None
        if sparsity is not None:
            sparsity.check()
            rows_, columns = _CORNER
            mask = list(sparsity.masks.values())[-7][:rows_, :columns].int().tolist()
        return {"rows": rows, "mask": mask}

    def _learn(
        self, recipe: Recipe, model: PreTrainedModel, sparsity: Sparsity | None, cost: float
    ) -> list[dict[str, Any]]:
        """Take all steps of a recipe, and return a row for each measurement."""
        stream, held_out = self.texts
        learning = Pretraining(recipe, model, make_optimizer(recipe, model))
        if sparsity:
            sparsity.follow(learning.optimizer)
        rows: list[dict[str, Any]] = []
        before = _copy(sparsity)
        for step in range(recipe.steps):
            learning.learn(stream, step)
            if learning.step % recipe.every == 0 or learning.step == recipe.steps:
                now = _copy(sparsity)
                done = {"step": learning.step, "operations": learning.step * cost / self.recipe.steps}
                rows.append({**done, "perplexity": perplexity(model, held_out), "churn": _churn(before, now)})
                before = now
        return rows


def compare(rows: DataFrame, against: str) -> DataFrame:
    """Return by how much the last perplexity of each pattern and method is above another method's, in per cent.

    Each seed is compared with the same; ``change_percent`` is the mean, from ``low`` to ``high`` its interval of 95 %,
    None with one seed.  ``against`` is a method of the same pattern, or "dense".
    """
    from pandas import DataFrame

    last = rows.loc[rows.groupby(["equal", "pattern", "method", "seed"])["step"].idxmax()]
    value = last.set_index(["equal", "pattern", "method", "seed"])["perplexity"]
    table = []
    for (equal, pattern, method), own in last.groupby(["equal", "pattern", "method"], sort=False):
        there = DENSE if against == DENSE else pattern
        if method in (against, DENSE) or (equal, there, against) not in {key[:3] for key in value.index}:
            continue
        ratios = [
            100 * (ppl / value["steps" if against == DENSE else equal, there, against, seed] - 1)
            for ppl, seed in zip(own["perplexity"], own["seed"], strict=True)
        ]
        mean, half = find_interval(ratios) if len(ratios) > 1 else (ratios[0], float("nan"))
        told = {"equal": equal, "pattern": pattern, "method": method, "against": against, "seeds": len(ratios)}
        table.append({**told, "change_percent": mean, "low": mean - half, "high": mean + half})
    return DataFrame(table)


def _sparse(
    model: PreTrainedModel, pattern: str, method: Method, seed: int, masks: dict[str, Tensor] | None = None
) -> Sparsity:
    return sparse(model, {"lm_head": "dense", "*": pattern}, method, masks=masks, seed=seed)


def _draw(model: PreTrainedModel, pattern: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Random masks of a pattern by the names of the layers."""
    matrices = {name: m.weight for layer in find_decoder(model).matrices for name, m in layer.items()}
    bound = {name: parse(pattern).bind((W.shape[0], W.shape[1])) for name, W in matrices.items()}
    return {name: bound[name].project(torch.rand(W.shape, generator=generator)) for name, W in matrices.items()}


def _copy(sparsity: Sparsity | None) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in sparsity.masks.items()} if sparsity else {}


def _churn(before: dict[str, Tensor], now: dict[str, Tensor]) -> float:
    """The share of what is kept now that was not before."""
    kept = sum(int(mask.sum()) for mask in now.values())
    return sum(int((mask & ~before[name]).sum()) for name, mask in now.items()) / kept if kept else 0.0
