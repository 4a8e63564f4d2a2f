"""Tuning after pruning: what was kept of a language model is trained on text, and every zero stays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from s3lab.errors import DataError
from s3lab.folder import check_folder, claim
from s3lab.models.measure.evaluate import check_window
from s3lab.models.prune.rundir import hash_tensors
from s3lab.models.recover.distil import check_terms
from s3lab.models.recover.targets import Target, find_targets
from s3lab.models.recover.tuning import TUNERS, Training, Tuning
from s3lab.models.storage.checkpoint import read_record, save_model, write_record, write_table
from s3lab.shapes import Integer
from s3lab.training import densify, sparse
from s3lab.training.base import Method

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKPOINT = "tuning.safetensors"


@dataclass
class Tuned:
    """What `tune_model` did: a row a measurement, the step of the weights that were kept, and how many it trained."""

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

    >>> import torch
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
    terms = tuning.loss or (("text",) if teacher is None else ("logits",))
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
    with (
        claim(out),
        _in_float32(model),
        _report(progress, tuning.steps) as report,
        _sparse(model, targets, method, tuning.seed),
    ):
        training = Training(model, ids, held_out, tuning, terms, teacher)
        if path and path.exists():
            training.restore(path, settings)
            report(training.rows[-1])
        while not training.is_over:
            training.advance(report)
            if path:
                training.store(path, settings)
        for name, p in training.trained.items():
            p.data.copy_(training.best[name])
    return Tuned(training.rows, training.best_step, sum(p.numel() for p in training.trained.values()), settings)


def save_tuned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    out: str | Path,
    tuned: Tuned,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Save a tuned model as `save_pruned` does, with what the record of the pruned one tells, and return ``out``.

    ``folder`` is that of the pruned model; the tuning joins its record and its card.  Raises DataError where there is
    no record, or ``out`` is the same folder or holds files that s3lab did not make.
    """
    folder, out = Path(folder), Path(out)
    check_folder(out)
    if out.resolve() == folder.resolve():
        raise DataError(f"{out} is the pruned model itself: give another folder")
    record = read_record(folder)
    save_model(model, tokenizer, out)
    told = {"settings": tuned.settings, "provenance": dict(provenance or {}), "best_step": tuned.best_step}
    record["tuned"] = [*record.get("tuned", []), {**told, "trained": tuned.trained, "rows": tuned.rows}]
    card = folder / "README.md"
    write_record(out, record, (card.read_text() if card.exists() else "") + write_section(tuned))
    return out


def write_section(tuned: Tuned) -> str:
    """Return what a model card tells of a tuning, in Markdown."""
    settings, columns = tuned.settings, [key for key in tuned.rows[-1]]
    return (
        f"\n## Tuned\n\n{tuned.trained} numbers trained by `{settings['method']}` at a rate of up to "
        f"{settings['lr']:g}, {settings['tokens']} tokens a step, on {' and '.join(settings['loss'])}.  "
        f"The zeros stayed, and the weights are those of step {tuned.best_step}.\n\n"
        + write_table(columns, [[row[key] for key in columns] for row in tuned.rows])
        + "\n"
    )


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
def _report(
    progress: bool | Callable[[dict[str, Any]], object], total: int
) -> Iterator[Callable[[dict[str, Any]], object]]:
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
