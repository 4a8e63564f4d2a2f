"""A pruned model tuned by several methods: perplexity over the steps, on the text it learns from and on others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import s3lab
from s3lab.lab.run.fresh import hash_source
from s3lab.lab.study.recall import recall
from s3lab.models.prune.sequential import prune_model
from s3lab.models.recover.tune import tune_model
from s3lab.models.recover.tuning import Tuning
from s3lab.models.storage.checkpoint import read_record, save_pruned
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model, to_dtype, to_fast_dtype
from s3lab.tensors.meter import Meter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Recovery:
    """What all rows share: a model, texts by name, and a folder for what is finished.

    Of the first text the model learns, and windows of its held-out part tell the weights to keep; of each text windows
    of the test split are measured.  ``sequences`` of ``length`` tokens of its calibration split prune.  Each pruned
    model, each checkpoint of a tuning and each finished one is kept in ``folder``.
    """

    model: str
    texts: Mapping[str, str]
    folder: str | Path
    sequences: int = 128
    windows: int = 16
    length: int = 256
    seed: int = 0

    def rows(
        self, pairs: Sequence[tuple[str, str]], tunings: Sequence[Tuning], distil: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Yield rows of each tuning of the model pruned by each pair of pattern and solver, and one of the dense model.

        A row tells ``step``, ``<text>_perplexity`` of each text, the numbers ``trained``, and the peak of memory above
        what was there before, ``mem_mib``, and seconds, ``time_s``, of the whole tuning.  With ``distil`` the dense
        model teaches.
        """
        source = [hash_source(Path(s3lab.__file__).parent / floor) for floor in ("algebra", "solvers", "training")]
        common = {**asdict(self), "distil": distil, "source": source}
        del common["folder"]
        yield recall(self.folder, {**common, "method": "dense"}, self._measure_dense)
        for pattern, solver in pairs:
            for tuning in tunings:
                told = {"pattern": pattern, "solver": solver, "method": tuning.method}
                key = {**common, **told, **asdict(tuning)}
                found = recall(self.folder, key, lambda t=told, u=tuning: self._tune(t, u, distil))
                yield from ({**told, **row} for row in found)

    @cached_property
    def dense(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The dense model and its tokenizer."""
        model, tokenizer = load_model(self.model)
        to_fast_dtype(model)
        return model, tokenizer

    @cached_property
    def tests(self) -> dict[str, Any]:
        """Windows of each text to measure on."""
        options = {"length": self.length, "count": self.windows, "seed": self.seed}
        return {name: corpus.tokens(self.dense[1], "test", source=text, **options) for name, text in self.texts.items()}

    def _measure_dense(self) -> dict[str, Any]:
        from s3lab.models.text.reference import perplexity

        found = {f"{name}_perplexity": perplexity(self.dense[0], ids) for name, ids in self.tests.items()}
        return {"pattern": "dense", "solver": "", "method": "dense", "step": 0, **found}

    def _tune(self, told: Mapping[str, str], tuning: Tuning, distil: bool) -> list[dict[str, Any]]:
        name = f"{told['solver']}-{''.join(c if c.isalnum() else '-' for c in told['pattern'])}"
        folder = Path(self.folder) / "pruned" / f"{self.model}-{name}-{self.sequences}-{self.length}-{self.seed}"
        text = next(iter(self.texts.values()))
        if not (folder / "s3lab.json").exists():
            model, tokenizer = deepcopy(self.dense[0]), self.dense[1]
            options = {"calibration": text, "sequences": self.sequences, "length": self.length, "seed": self.seed}
            run = prune_model(model, tokenizer, told["pattern"], told["solver"], progress=False, **options)
            stored = model.config.dtype
            assert isinstance(stored, torch.dtype)
            to_dtype(model, stored)
            folder.mkdir(parents=True, exist_ok=True)
            save_pruned(model, tokenizer, folder, run)
        model, tokenizer = load_model(folder)
        ids, own = corpus.hold_out(corpus.tokens(tokenizer, "train", self.length, source=text), self.windows, self.seed)
        run = Path(self.folder) / "tuning" / f"{name}-{tuning.method}-{tuning.steps}-{tuning.seed}"
        with Meter("cpu") as meter:
            tuned = tune_model(
                model,
                read_record(folder)["matrices"],
                ids,
                {"held_out": own, **self.tests},
                tuning,
                teacher=self.dense[0] if distil else None,
                out=run,
            )
        cost = {"trained": tuned.trained, "mem_mib": meter.mem_mib, "time_s": meter.time_s}
        return [{**row, **cost} for row in tuned.rows]
