"""One model pruned by many methods on several texts, each measured on all of them; finished rows are kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import s3lab
from s3lab.errors import DataError
from s3lab.lab.run.fresh import hash_source
from s3lab.lab.study.bits import WEIGHT_BITS, count_bits
from s3lab.lab.study.recall import recall
from s3lab.models.prune.sequential import prune_model
from s3lab.models.prune.shrink import shrink
from s3lab.models.text import corpus
from s3lab.models.text.pretrained import load_model
from s3lab.models.text.reference import perplexity
from s3lab.solvers import MatchVariance, make_solver

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENSE = "dense"
# What a method does beside its solver, by the word after the solver's name.
_EXTRAS = {"auto", "variance"}


@dataclass(frozen=True)
class Crossing:
    """What all rows share: a model, texts by name, each a source to calibrate on and one to measure on, and sizes.

    ``sequences`` of ``length`` tokens calibrate, and ``windows`` of them measure.  With ``hessians`` "dense" the
    second moments of each text are measured once, and serve all methods; "pruned" measures them again behind every
    pruned stage.  What is finished is kept in ``folder``: a row is made again only where the code of the algebra, the
    tensors or the solvers has changed.
    """

    model: str
    texts: Mapping[str, Sequence[str]]
    folder: str | Path
    dtype: str = "bfloat16"
    hessians: str = "dense"
    sequences: int = 128
    windows: int = 40
    length: int = 512
    damp: float = 1e-2
    seed: int = 0
    device: str = "cpu"

    def rows(
        self,
        pairs: Sequence[tuple[str, str]],
        calibrated_on: Sequence[str],
        prompts: Sequence[str] = (),
        tokens: int = 40,
    ) -> Iterator[dict[str, Any]]:
        """Yield a row for the dense model, then for each text to calibrate on one of each pair of pattern and method.

        A method is the name of a solver, with "auto" behind it for damping by held-out error, or "variance" for rows
        whose variance is matched.  A row tells ``<text>_perplexity`` of each text, the mean errors of the matrices on
        calibration and held-out tokens, ``density``, ``bits`` a weight, seconds, and what the model makes of each
        prompt in ``tokens`` greedy tokens.  Raises DataError for a method or a text that is not there.
        """
        for _, method in pairs:
            _read_method(method)
        jobs = [(DENSE, DENSE, ""), *((pattern, method, text) for text in calibrated_on for pattern, method in pairs)]
        loaded: list[tuple[PreTrainedModel, PreTrainedTokenizerBase]] = []
        source = [hash_source(Path(s3lab.__file__).parent / floor) for floor in ("algebra", "tensors", "solvers")]
        for pattern, method, text in jobs:
            told = {"pattern": pattern, "method": method, "calibrated_on": text}
            key = {**asdict(self), **told, "prompts": list(prompts), "tokens": tokens, "source": source}
            del key["folder"]

            def make(pattern: str = pattern, method: str = method, text: str = text) -> dict[str, Any]:
                loaded.extend([] if loaded else [load_model(self.model, self.dtype, self.device)])
                row = self._measure(*loaded[0], pattern, method, text, prompts, tokens)
                return {"pattern": pattern, "method": method, "calibrated_on": text, **row}

            yield recall(self.folder, key, make)

    def _measure(
        self,
        dense: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pattern: str,
        method: str,
        text: str,
        prompts: Sequence[str],
        tokens: int,
    ) -> dict[str, Any]:
        began = time.perf_counter()
        model, figures = dense, {"density": 1.0, "bits": float(WEIGHT_BITS)}
        if method != DENSE:
            model = deepcopy(dense)
            figures = self._prune(model, tokenizer, pattern, method, text)
        pruned_s = time.perf_counter() - began
        for name, (_, test) in self.texts.items():
            ids = corpus.tokens(tokenizer, "test", self.length, self.windows, self.seed, test)
            figures[f"{name}_perplexity"] = perplexity(model, ids.to(self.device))
        told = {f"prompt_{n}": _go_on(model, tokenizer, prompt, tokens) for n, prompt in enumerate(prompts)}
        return figures | {"time_s": pruned_s, **told}

    def _prune(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pattern: str, method: str, text: str
    ) -> dict[str, Any]:
        solver, extra = _read_method(method)
        run = prune_model(
            model,
            tokenizer,
            pattern,
            MatchVariance(make_solver(solver)) if extra == "variance" else solver,
            calibration=self.texts[text][0],
            sequences=self.sequences,
            length=self.length,
            damp="auto" if extra == "auto" else self.damp,
            hessians=self.hessians,
            moments=Path(self.folder) / f"moments-{text}" if self.hessians == "dense" else None,
            seed=self.seed,
            progress=False,
        )
        if " keep " in pattern:
            shrink(model)
        led = [row for row in run.matrices if row["error"] is not None]
        return {
            "error_percent": 100 * sum(row["error"] for row in led) / len(led),
            "error_test_percent": 100 * sum(row["error_test"] for row in led) / len(led),
            "density": run.density,
            "bits": count_bits(run.matrices),
            "solver_s": sum(row["time_s"] for row in run.matrices),
        }


def _read_method(method: str) -> tuple[str, str]:
    """Return the solver of a method, and the word behind it."""
    solver, _, extra = method.partition(" ")
    if extra and extra not in _EXTRAS:
        raise DataError(f"the method {method!r} is a solver and {extra!r}: behind a solver goes {' or '.join(_EXTRAS)}")
    make_solver(solver)
    return solver, extra


@torch.inference_mode()
def _go_on(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int) -> str:
    """What a model makes of a prompt, token by token the most likely one."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.device)
    out = model.generate(  # pyright: ignore[reportCallIssue]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
