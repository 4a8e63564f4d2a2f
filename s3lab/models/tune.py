"""Tuning after pruning: what was kept of a language model is trained on text, and every zero stays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from s3lab.algebra.couple import Coupled
from s3lab.algebra.patterns import parse
from s3lab.algebra.spec import Pattern
from s3lab.errors import DataError, SolveError, SpecError
from s3lab.files import replacing, telling
from s3lab.folder import claim
from s3lab.models.checkpoint import group_rows
from s3lab.models.decoder import find_decoder
from s3lab.models.distil import check_terms, find_loss
from s3lab.models.evaluate import check_window
from s3lab.models.reference import pace, perplexity
from s3lab.models.rundir import hash_tensors
from s3lab.packing.codec import ALONE, pack
from s3lab.shapes import Integer
from s3lab.training import densify, sparse
from s3lab.training.base import Method
from s3lab.training.fixed import Fixed
from s3lab.training.lora import LoRA
from s3lab.training.spp import SPP

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHECKPOINT = "tuning.safetensors"
MOMENTS = "exp_avg", "exp_avg_sq"
# What keeps the mask, with the highest learning rate that each takes if none is given.
TUNERS: dict[str, tuple[type[Method], float]] = {"fixed": (Fixed, 1e-4), "spp": (SPP, 1e-2), "lora": (LoRA, 1e-3)}
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a pruned model is tuned: AdamW without weight decay, gradients clipped to the norm 1.

    A step sees ``tokens`` tokens, ``batch`` sequences at a time, whose products are in ``dtype``; the rate rises to
    ``lr`` over a share ``warmup`` of the ``steps`` and falls by a half cosine, `reference.pace`.  ``method`` is one of
    `TUNERS`, with its own rate if ``lr`` is None.  ``loss`` has the terms of `distil.find_loss`; without any they are
    "text", and with a teacher "text" and "logits".  Every ``every`` steps, and at the end, held-out text is measured
    and a checkpoint left; the tuning ends early when ``patience`` measurements in a row were no better than the best.
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
    dtype: str = "bfloat16"
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
class Tuned:
    """What `tune_model` did: a row for each measurement, the step of the weights that were kept, and what it trained."""

    rows: list[dict[str, Any]]
    best_step: int
    trained: int
    settings: dict[str, Any]


def tune_model(
    model: PreTrainedModel,
    matrices: Sequence[Mapping[str, Any]],
    ids: Integer[Tensor, "N L"],
    held_out: Mapping[str, Integer[Tensor, "_ _"]],
    tuning: Tuning | None = None,
    *,
    teacher: PreTrainedModel | None = None,
    out: str | Path | None = None,
    progress: bool | Callable[[dict[str, Any]], object] = True,
) -> Tuned:
    """Train what is kept of a pruned model, in place, on the sequences ``ids``, and return what came of it.

    ``matrices`` are the rows of the run that pruned it, as `Run.matrices` and ``s3lab.json`` have them, and say which
    matrix was pruned by which spec: those are trained, under the mask that pruning found, and nothing else is.  Weights
    are trained in float32 whatever their dtype, which they have again in the end, zeros exactly zero.

    ``held_out`` has sequences by name, whose perplexity is measured; of the first the lowest tells the weights to keep,
    the untouched ones included, so that tuning does no harm there.  ``teacher``, the dense model, is learnt from as
    ``tuning.loss`` says.  ``out`` names a folder for the checkpoint: the same call on the same model goes on from the
    last one, on a CPU to the same bits.  ``progress`` is a bar, or a function of each row:
    ``step``, the mean ``loss`` since the row before, and ``<name>_perplexity``.

    Raises DataError for rows of another model, matrices that are no linear layers, sequences that are too few or too
    long, a teacher of other sizes, and a checkpoint of other settings; SpecError for a matrix that is not pruned as its
    row says; SolveError where the loss is no number.  Cost: 3 forward passes over all tokens, 4 with a teacher or
    ``recompute``, and memory of 16 bytes for each number that is trained.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> import s3lab as s3
    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    >>> model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    >>> ids = torch.arange(256).view(16, 16) % 64
    >>> run = s3.prune_model(model, None, "2:4", "magnitude", calibration=ids, progress=False)
    >>> tuning = Tuning(steps=10, tokens=64, lr=1e-2)
    >>> tuned = tune_model(model, run.matrices, ids[2:], {"held_out": ids[:2]}, tuning, progress=False)
    >>> tuned.rows[-1]["held_out_perplexity"] < tuned.rows[0]["held_out_perplexity"]
    True
    """
    tuning = tuning or Tuning()
    terms = tuning.loss or (("text",) if teacher is None else ("text", "logits"))
    check_terms(model, teacher, terms)
    if not held_out:
        raise DataError("no held-out text is given, by which the best weights are told: give some sequences")
    check_window(model, ids.shape[1], ids.shape[1], tuning.batch)
    targets = find_targets(model, matrices)
    settings = {
        **asdict(tuning),
        "loss": terms,
        "lr": tuning.top,
        "model": hash_tensors(dict(model.named_parameters())),
        "teacher": teacher and hash_tensors(dict(teacher.named_parameters())),
        "text": hash_tensors({"ids": ids, **{f"held out {name}": part for name, part in held_out.items()}}),
    }
    settings, path = json.loads(json.dumps(settings)), None if out is None else Path(out) / CHECKPOINT
    method = TUNERS[tuning.method][0]()
    with claim(out), _in_float32(model), _report(progress, tuning.steps) as report:
        with _sparse(model, targets, method, tuning.seed):
            school = _School(model, ids, held_out, tuning, terms, teacher)
            if path and path.exists():
                school.restore(path, settings)
                report(school.rows[-1])
            while not school.is_over:
                school.advance(report)
                if path:
                    school.store(path, settings)
            for name, p in school.trained.items():
                p.data.copy_(school.best[name])
    return Tuned(school.rows, school.best_step, sum(p.numel() for p in school.trained.values()), settings)


@dataclass(frozen=True, eq=False)
class Target:
    """Matrices of a model that one spec pruned together, and their masks (M, K), by full name."""

    spec: Pattern
    masks: dict[str, Tensor]


def find_targets(model: PreTrainedModel, matrices: Sequence[Mapping[str, Any]]) -> list[Target]:
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


@dataclass
class _School:
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
        dtype = getattr(torch, self.tuning.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def measure(self, loss: float | None) -> None:
        """Add a row, and keep the weights if they are the best."""
        with self.autocast():
            found = {f"{name}_perplexity": perplexity(self.model, ids, 4) for name, ids in self.held_out.items()}
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
def _in_float32(model: nn.Module) -> Iterator[None]:
    """Have all parameters of a model in float32, and then each as it was: its dtype, and whether it takes gradients."""
    training, before = model.training, [(p, p.dtype, p.requires_grad) for p in model.parameters()]
    for p, dtype, _ in before:
        p.data = p.data.float() if dtype.itemsize < 4 else p.data
    try:
        yield
    finally:
        model.train(training)
        for p, dtype, asked in before:
            p.data = p.data.to(dtype)
            p.grad = None
            p.requires_grad_(asked)


@contextmanager
def _sparse(model: nn.Module, targets: list[Target], method: Method, seed: int) -> Iterator[None]:
    """Have the targets trained by a method, and nothing else; in the end they have plain weights with real zeros."""
    model.requires_grad_(False)
    made = []
    try:
        for target in targets:
            for name in target.masks:
                model.get_submodule(name).get_parameter("weight").requires_grad_(True)
            made.append(sparse(model, target.spec, method, list(target.masks), masks=target.masks, seed=seed))
        yield
        for sparsity in made:
            sparsity.check()
    finally:
        if made:
            densify(model)


@contextmanager
def _training(model: PreTrainedModel, tuning: Tuning) -> Iterator[None]:
    """Have a model in training mode, its activations recomputed where that is asked for."""
    if tuning.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    try:
        yield
    finally:
        model.eval()
        if tuning.recompute:
            model.gradient_checkpointing_disable()


@contextmanager
def _report(progress: bool | Callable[[dict[str, Any]], object], total: int) -> Iterator[Callable[[dict[str, Any]], object]]:
    """Yield what hears of each step and each row: a bar, or of the rows alone the function given, or nothing."""
    if progress is False:
        yield lambda row: None
    elif callable(progress):
        yield lambda row: progress(row) if len(row) > 2 else None
    else:
        from tqdm.auto import tqdm

        with tqdm(total=total, unit="step") as bar:
            told: dict[str, str] = {}

            def show(row: dict[str, Any]) -> None:
                told.update({key: f"{value:.4g}" for key, value in row.items() if key != "step" and value is not None})
                bar.set_postfix(told, refresh=False)
                bar.update(row["step"] - bar.n)

            yield show
