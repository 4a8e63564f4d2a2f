"""Patterns, solvers, and what may be done before and after them: perplexity and bits of every combination."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from s3lab.errors import DataError
from s3lab.lab.study.bits import WEIGHT_BITS, count_index_bits
from s3lab.models.correct.equalise import equalise
from s3lab.models.correct.finetune import Schedule, finetune
from s3lab.models.prune.sequential import prune_model
from s3lab.models.structure.decoder import find_decoder
from s3lab.models.text.reference import perplexity
from s3lab.shapes import Integer
from s3lab.solvers import MatchVariance, make_solver

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CORRECTIONS = ("none", "equalise", "variance", "both", "salient", "finetune")


@dataclass(frozen=True, eq=False)
class Comparison:
    """What all combinations share: a dense model, which stays as it is, calibration and test sequences, and options.

    Corrections are measured one by one, each against "none": the dense model is made even by `equalise` before; the
    variance of rows is matched after, by `MatchVariance`; "both" of these; the weights of the pattern ``salient``,
    picked by ``score``, are kept in full beside; what is kept is trained by `finetune` on ``schedule``.
    """

    dense: PreTrainedModel
    calibration: Integer[Tensor, "N L"]
    test: Integer[Tensor, "n L"]
    salient: str = "16:256"
    score: str = "ria"
    schedule: Schedule = field(default_factory=Schedule)
    damp: float = 1e-2
    seed: int = 0

    def measure(self, pattern: str, solver: str, correction: str) -> dict[str, Any]:
        """Return the row of a combination.

        ``perplexity`` on the test sequences; ``density``, ``index_bits`` and ``bits`` = 16·density + index_bits per
        weight of the pruned matrices; ``error_test``, the mean output error of the matrices on held-out tokens.
        Raises DataError for a correction that is none of `CORRECTIONS`.
        """
        if correction not in CORRECTIONS:
            raise DataError(f"no correction is called {correction!r}: there are {', '.join(CORRECTIONS)}")
        method = make_solver(solver)
        method = MatchVariance(method) if correction in ("variance", "both") else method
        spec = f"{pattern} plus {self.salient}" if correction == "salient" else pattern
        model = deepcopy(self._even if correction in ("equalise", "both") else self.dense)
        options: dict[str, Any] = {"damp": self.damp, "seed": self.seed, "progress": False}
        run = prune_model(model, None, spec, method, calibration=self.calibration, salient=self.score, **options)
        if correction == "finetune":
            finetune(model, self.dense, self.calibration, self.schedule, seed=self.seed, progress=False)
        bits = count_index_bits(run.matrices)
        errors = [row["error_test"] for row in run.matrices]
        return {
            "pattern": pattern,
            "solver": solver,
            "correction": correction,
            "density": run.density,
            "index_bits": bits,
            "bits": WEIGHT_BITS * run.density + bits,
            "error_test": sum(errors) / len(errors),
            "perplexity": perplexity(model, self.test),
            "solver_s": sum(row["time_s"] for row in run.matrices),
        }

    def measure_dense(self, model: PreTrainedModel, name: str) -> dict[str, Any]:
        """Return the row of a dense model, under a name in place of the solver's.

        ``bits`` are those that the matrices of the larger model would have to take to weigh as much with all the rest.
        """
        matrices = sum(m.weight.numel() for layer in find_decoder(self.dense).matrices for m in layer.values())
        rest = _count(self.dense) - matrices
        return {
            "pattern": "dense",
            "solver": name,
            "correction": "none",
            "density": 1.0,
            "index_bits": 0.0,
            "bits": WEIGHT_BITS * (_count(model) - rest) / matrices,
            "error_test": 0.0,
            "perplexity": perplexity(model, self.test),
            "solver_s": 0.0,
        }

    @cached_property
    def _even(self) -> PreTrainedModel:
        even = deepcopy(self.dense)
        equalise(even, self.calibration)
        return even


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
