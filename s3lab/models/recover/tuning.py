"""A tuning under way: how a pruned model learns, step by step, and what a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from s3lab.errors import DataError, SolveError
from s3lab.files import replacing, telling
from s3lab.models.recover.distil import find_loss
from s3lab.models.structure.decoder import find_decoder
from s3lab.models.text.pretraining import pace
from s3lab.models.text.reference import perplexity
from s3lab.tensors.meter import fast_dtype
from s3lab.training.base import Method
from s3lab.training.fixed import Fixed
from s3lab.training.lora import LoRA
from s3lab.training.spp import SPP

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOMENTS = "exp_avg", "exp_avg_sq"  # of AdamW
# What keeps the mask, with the highest learning rate that each takes if none is given.
TUNERS: dict[str, tuple[type[Method], float]] = {"fixed": (Fixed, 3e-4), "spp": (SPP, 1e-2), "lora": (LoRA, 1e-3)}
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a pruned model is tuned: AdamW without weight decay, gradients clipped to the norm 1.

    A step sees ``tokens`` tokens, ``batch`` sequences at a time, whose products are in ``dtype``, of which "auto" is
    bfloat16, or float32 on a CPU where that is faster; the rate rises to ``lr`` over a share ``warmup`` of the
    ``steps`` and falls by a half cosine, `reference.pace`.  ``method`` is one of `TUNERS`, with its own rate if ``lr``
    is None.  ``loss`` has the terms of `distil.find_loss`; without any they are "text", and with a teacher "logits".
    Every ``every`` steps, and at the end, held-out text is measured and a checkpoint left; the tuning ends early when
    ``patience`` measurements in a row were no better than the best.
    ``recompute`` keeps the activations of decoder layers no longer than needed, for a forward pass more.

    Raises SolveError for options that cannot be.

    >>> Tuning(method="lora").rate(0), Tuning(steps=10, lr=0.5).rate(0)
    (5e-05, 0.5)
    """

    method: str = "fixed"
    steps: int = 200
    tokens: int = 2048
    batch: int = 4
    lr: float | None = None
    warmup: float = 0.1
    loss: tuple[str, ...] = ()
    every: int = 20
    patience: int = 5
    dtype: str = "auto"
    recompute: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in TUNERS:
            raise SolveError(f"method={self.method!r} keeps no mask: use one of {', '.join(TUNERS)}")
        if self.dtype not in DTYPES:
            raise SolveError(f"dtype={self.dtype!r}: products are taken in {' or '.join(DTYPES)}")
        counts = {name: getattr(self, name) for name in ("steps", "tokens", "batch", "every", "patience")}
        if wrong := [f"{name}={count}" for name, count in counts.items() if count < 1]:
            raise SolveError(f"{', '.join(wrong)} leaves nothing to train: take at least 1")
        if not 0 <= self.warmup <= 1 or not 0 < self.top < inf:
            raise SolveError(f"lr={self.lr} and warmup={self.warmup}: a rate above 0, and a share from 0 to 1")

    @property
    def top(self) -> float:
        """The highest learning rate."""
        return TUNERS[self.method][1] if self.lr is None else self.lr

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return self.top * pace(step, self.steps, self.warmup)


@dataclass
class Training:
    """A tuning under way: the model, its lessons, and what a checkpoint holds."""

    model: PreTrainedModel
    ids: Tensor
    held_out: Mapping[str, Tensor]
    tuning: Tuning
    terms: Sequence[str]
    teacher: PreTrainedModel | None
    step: int = 0
    losses: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=self.tuning.top, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.device = self.model.device

    @property
    def judge(self) -> str:
        """The column of the rows that tells which weights are best."""
        return f"{next(iter(self.held_out))}_perplexity"

    @property
    def best_step(self) -> int:
        """The step with the lowest perplexity, the first of equals."""
        return min(self.rows, key=lambda row: row[self.judge])["step"]

    @property
    def is_over(self) -> bool:
        """Whether all steps are done, or too many measurements were in vain."""
        vain = sum(row["step"] > self.best_step for row in self.rows) if self.rows else 0
        return self.step == self.tuning.steps or vain >= self.tuning.patience

    def advance(self, report: Callable[[dict[str, Any]], object]) -> None:
        """Go on to the next measurement; before the first step, measure the model as it is."""
        if self.rows:
            losses = []
            while not losses or (self.step % self.tuning.every and self.step < self.tuning.steps):
                losses.append(self.learn())
                report({"step": self.step, "loss": losses[-1]})
            self.measure(sum(losses) / len(losses))
        else:
            self.measure(None)
        report(self.rows[-1])

    def learn(self) -> float:
        """Take a step, and return its loss."""
        tuning, device = self.tuning, self.device
        for group in self.optimizer.param_groups:
            group["lr"] = tuning.rate(self.step)
        # all chance of a step hangs on its number alone, so that a resumed run meets the same
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _training(self.model, tuning):
            torch.manual_seed(tuning.seed * 1_000_003 + self.step)
            total = 0.0
            ids = self.draw(self.step).to(device)
            for part in ids.split(tuning.batch):
                with torch.enable_grad():
                    with self.autocast():
                        loss = find_loss(self.model, self.teacher, part, self.terms) * (len(part) / len(ids))
                    loss.backward()
                total += loss.item()
        if not isfinite(total):
            raise SolveError(f"the loss is {total} at step {self.step}: lower lr={tuning.top:g}")
        nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total

    def draw(self, step: int) -> Tensor:
        """Return the sequences of a step: all in turn, in another order each time round."""
        count = max(1, self.tuning.tokens // self.ids.shape[1])
        places = range(step * count, (step + 1) * count)
        orders = {
            turn: torch.randperm(
                len(self.ids), generator=torch.Generator().manual_seed(self.tuning.seed * 1_000_003 + turn)
            )
            for turn in {place // len(self.ids) for place in places}
        }
        return self.ids[torch.stack([orders[place // len(self.ids)][place % len(self.ids)] for place in places])]

    def autocast(self) -> torch.autocast:
        """Products in the dtype of the tuning."""
        told = self.tuning.dtype
        dtype = fast_dtype(torch.bfloat16, self.device) if told == "auto" else getattr(torch, told)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def measure(self, loss: float | None) -> None:
        """Add a row, and keep the weights if they are the best."""
        with self.autocast():
            found = {f"{name}_perplexity": perplexity(self.model, ids) for name, ids in self.held_out.items()}
        if not all(map(isfinite, found.values())):
            raise SolveError(f"the perplexity is {found[self.judge]} at step {self.step}: lower lr={self.tuning.top:g}")
        self.rows.append({"step": self.step, "loss": loss, **found})
        if self.best_step == self.step:
            self.best = {name: p.detach().clone() for name, p in self.trained.items()}

    def store(self, path: Path, settings: dict[str, Any]) -> None:
        """Leave a checkpoint of the whole state, at the end of what was best alone."""
        from safetensors.torch import save_file

        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, p in self.trained.items() if not self.is_over else ():
            moments = self.optimizer.state[p]
            tensors |= {f"{key}/{name}": moments[key] for key in MOMENTS if key in moments}
            tensors[f"weight/{name}"] = p.data
        facts = {"settings": settings, "step": self.step, "rows": self.rows}
        with replacing(path) as part, telling(path):
            save_file(tensors, part, {key: json.dumps(value) for key, value in facts.items()})

    def restore(self, path: Path, settings: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; DataError for one of other settings, naming them, or a damaged one."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(self.device)) as file:
                facts = {key: json.loads(value) for key, value in file.metadata().items()}
                theirs = facts["settings"]
                if wrong := [key for key in {**settings, **theirs} if settings.get(key) != theirs.get(key)]:
                    told = "; ".join(f"{key} is {theirs.get(key)!r} there, {settings.get(key)!r} here" for key in wrong)
                    raise DataError(f"the tuning in {str(path)!r} has other settings: {told}: give another folder")
                self.step, self.rows = facts["step"], facts["rows"]
                for name, p in self.trained.items():
                    self.best[name] = file.get_tensor(f"best/{name}")
                    if not self.is_over:
                        p.data.copy_(file.get_tensor(f"weight/{name}"))
                    if self.step and not self.is_over:
                        moments = {key: file.get_tensor(f"{key}/{name}") for key in MOMENTS}
                        count = torch.tensor(float(self.step), device=self.device)
                        self.optimizer.state[p] = {"step": count, **moments}
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise DataError(f"{str(path)!r} is damaged ({error}): delete it to begin anew") from error


@contextmanager
def _training(model: PreTrainedModel, tuning: Tuning) -> Iterator[None]:
    """Have a model in training mode, the activations of its decoder layers recomputed where that is asked for."""
    layers = find_decoder(model).layers if tuning.recompute else ()
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    model.train()
    try:
        yield
    finally:
        model.eval()
        for layer in layers:
            del layer.forward  # and so the class's own is there again
