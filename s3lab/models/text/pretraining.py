"""How the reference model was trained: a small Qwen3, by a recipe, on the built-in text alone."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from s3lab.errors import DataError, SolveError, SpecError
from s3lab.files import replacing
from s3lab.models.text import corpus
from s3lab.models.text.reference import load_reference, next_token_loss, perplexity, save

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that decides a model: its sizes, its data, and how it learns.

    A step sees ``batch`` windows of ``length`` tokens under autocast to ``dtype``; ``warmup`` is a share of
    the steps; every ``every`` steps, ``windows`` held-out windows are measured.  SpecError if a size is not a
    positive multiple of 16, a count is not positive, or the key-value heads do not divide the heads.

    >>> Recipe(layers=4).kv_heads
    2
    """

    vocab: int = 2048
    hidden: int = 256
    layers: int = 6
    intermediate: int = 768
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    steps: int = 1500
    batch: int = 8
    length: int = 256
    lr: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.1
    clip: float = 1.0
    dropout: float = 0.0
    every: int = 75
    windows: int = 64
    seed: int = 0
    device: str = "cpu"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("vocab", "hidden", "intermediate", "head_dim"):
            if (size := getattr(self, name)) < 16 or size % 16:
                raise SpecError(f"{name}={size} is no positive multiple of 16, which wide patterns need")
        for name in ("layers", "heads", "kv_heads", "steps", "batch", "length", "every", "windows"):
            if (count := getattr(self, name)) < 1:
                raise SpecError(f"{name}={count} leaves nothing to train: take at least 1")
        if self.heads % self.kv_heads:
            raise SpecError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}: take a divisor")

    def rate(self, step: int) -> float:
        """Learning rate of a step: a linear rise to ``lr``, then a half cosine down to a hundredth of it."""
        return self.lr * pace(step, self.steps, self.warmup)


def pace(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate: a linear rise over a share of the steps, then a half cosine down to 0.01.

    >>> [round(pace(step, 5, 0.4), 2) for step in range(5)]
    [0.5, 1.0, 1.0, 0.75, 0.26]
    """
    rise = max(1, round(warmup * steps))
    fall = (1 + math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))) / 2
    return min((step + 1) / rise, 0.01 + 0.99 * fall)


_TOY = Recipe(vocab=512, hidden=64, layers=2, intermediate=128, head_dim=16, length=64)
RECIPES = {
    "toy": replace(_TOY, steps=60, batch=16, lr=1e-2, every=10),
    # of the bytes that the next larger one has at 8:16, its embeddings dense
    "tiny": Recipe(hidden=144, intermediate=480, head_dim=32),
    "small": Recipe(hidden=192, intermediate=576, head_dim=48),
    "reference": Recipe(),
}


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE of ``vocab`` tokens on the training text, in about a second.

    DataError if ``vocab`` is too small for the 256 bytes or too large for the text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=recipe.vocab, special_tokens=["<|end|>"], show_progress=False)
    trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus.text("train").split("\n\n"), trainer)
    if (size := tokenizer.get_vocab_size()) != recipe.vocab:
        raise DataError(f"the training text gives {size} tokens, not vocab={recipe.vocab}: ask for that many")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>")


def build(recipe: Recipe) -> PreTrainedModel:
    """Build the untrained model of a recipe on its device in float32, its weights drawn with ``seed``."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        intermediate_size=recipe.intermediate,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.length,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attention_dropout=recipe.dropout,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = Qwen3ForCausalLM(config)
    nn.Module.to(model, recipe.device)
    return model


def train(
    recipe: Recipe,
    out: str | Path,
    facts: Mapping[str, Any] | None = None,
    log: Callable[[dict[str, Any]], object] = lambda row: None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Any]:
    """Train a model and its tokenizer, save the best state in the folder ``out``, and return the record.

    The best has the lowest perplexity on windows of the calibration text; the test text is read once, at the
    end.  Each measurement leaves a checkpoint of the whole state in ``out``, from which an interrupted call
    goes on to the same numbers.  ``log`` gets each row of the loss table, ``progress`` wraps the steps (as
    tqdm does), ``facts`` join the record.  DataError if the checkpoint is of another recipe, SolveError if
    the loss diverges.  Cost: 6 · parameters · tokens operations.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, model = train_tokenizer(recipe), build(recipe)
    stream = corpus.tokens(tokenizer, "train", 1).flatten()
    held_out = corpus.tokens(tokenizer, "calibration", recipe.length, recipe.windows, recipe.seed)
    run = Pretraining(recipe, model, make_optimizer(recipe, model))
    if (out / CHECKPOINT).exists():
        run.restore(out / CHECKPOINT)
    began, losses = time.perf_counter() - run.time_s, []
    for step in progress(range(run.step, recipe.steps)):
        losses.append(run.learn(stream, step))
        if run.step % recipe.every == 0 or run.step == recipe.steps:
            run.measure(torch.tensor(losses).double().mean().exp().item(), perplexity(model, held_out))
            losses.clear()
            run.time_s = time.perf_counter() - began
            run.store(out / CHECKPOINT)
            for row in run.rows[-2:]:
                log(row)
    for name, p in model.named_parameters():
        p.data = run.best[name]
    save(model, tokenizer, out)
    rows = [f"{row['step']},{row['split']},{row['perplexity']:.4f}" for row in run.rows]
    with replacing(out / "training.csv") as part:
        part.write_text("\n".join(["step,split,perplexity", *rows, ""]))
    record = run.describe(tokenizer, load_reference(out)[0]) | dict(facts or {})
    with replacing(out / "record.json") as part:
        part.write_text(json.dumps(record, indent=2) + "\n")
    (out / CHECKPOINT).unlink()
    return record


def unigram_perplexity(train_ids: Tensor, test_ids: Tensor, vocab: int) -> float:
    """Return the test perplexity of guessing by the training frequencies, one added to every count.

    >>> round(unigram_perplexity(torch.tensor([0, 0, 0]), torch.tensor([0, 1]), vocab=2), 9)  # √(5/4 · 5/1)
    2.5
    """
    counts = torch.bincount(train_ids.flatten(), minlength=vocab).double() + 1
    return (-(counts / counts.sum()).log()[test_ids.flatten()].mean()).exp().item()


@dataclass
class Pretraining:
    """A training under way, with what a checkpoint holds: ``learn`` takes a step."""

    recipe: Recipe
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    time_s: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    def learn(self, stream: Tensor, step: int) -> float:
        """Take a step on windows of a stream of tokens (n,), and return its loss."""
        recipe, device = self.recipe, torch.device(self.recipe.device)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        self.model.train()
        # All chance of a step hangs on its number alone, so that a resumed run meets the same.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(recipe.seed * 1_000_003 + step)
            starts = torch.randint(len(stream) - recipe.length + 1, (recipe.batch, 1))
            ids = stream[starts + torch.arange(recipe.length)].to(device)
            dtype = getattr(torch, recipe.dtype)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss = next_token_loss(self.model, ids, "mean")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.step = step + 1
        return loss.item()

    def measure(self, train: float, held_out: float) -> None:
        if not math.isfinite(held_out):
            raise SolveError(f"perplexity {held_out} at step {self.step}: lower lr={self.recipe.lr:g}")
        if all(held_out < row["perplexity"] for row in self.rows if row["split"] == "held-out"):
            weights = self.model.named_parameters()
            self.best = {name: p.detach().to(torch.bfloat16, copy=True) for name, p in weights}
        for split, value in (("train", train), ("held-out", held_out)):
            self.rows.append({"step": self.step, "split": split, "perplexity": value})

    def store(self, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, p in self.model.named_parameters():
            moments = {f"{key}/{name}": self.optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
            tensors |= moments | {f"weight/{name}": p.data}
        facts = {"recipe": asdict(self.recipe), "step": self.step, "time_s": self.time_s, "rows": self.rows}
        with replacing(path) as part:
            save_file(tensors, part, {key: json.dumps(value) for key, value in facts.items()})

    def restore(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt", device=self.recipe.device) as file:
            facts = {key: json.loads(value) for key, value in file.metadata().items()}
            if facts["recipe"] != asdict(self.recipe):
                raise DataError(f"{str(path)!r} is of another recipe: delete it, or train in another folder")
            self.step, self.time_s, self.rows = facts["step"], facts["time_s"], facts["rows"]
            count = torch.tensor(float(self.step), device=self.recipe.device)
            for name, p in self.model.named_parameters():
                p.data.copy_(file.get_tensor(f"weight/{name}"))
                moments = {key: file.get_tensor(f"{key}/{name}") for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": count.clone(), **moments}
                self.best[name] = file.get_tensor(f"best/{name}")

    def describe(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, Any]:
        import tokenizers
        import transformers

        ids = {split: corpus.tokens(tokenizer, split, self.recipe.length) for split in corpus.SPLITS}
        held_out = {row["perplexity"]: row["step"] for row in self.rows if row["split"] == "held-out"}
        packages = (torch, transformers, tokenizers)
        return {
            "recipe": asdict(self.recipe),
            "parameters": sum(p.numel() for p in model.parameters()),
            "best_step": held_out[min(held_out)],
            "perplexity": perplexity(model, ids["test"]),
            "unigram_perplexity": unigram_perplexity(ids["train"], ids["test"], self.recipe.vocab),
            "tokens": {split: windows.numel() for split, windows in ids.items()},
            "time_s": round(self.time_s, 1),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages},
        }


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW of a recipe, without decay of vectors."""
    matrices = {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.weight_decay}
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=recipe.lr, betas=(0.9, 0.95), fused=True)
