"""How well a language model guesses text: perplexity, by our own count and by lm_eval's, and lm_eval's tasks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from s3lab.errors import DataError, SpecError
from s3lab.models.structure.capture import evaluating

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UNSCORED = -100


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: str | Sequence[str],
    *,
    length: int = 256,
    stride: int | None = None,
    batch: int = 8,
) -> dict[str, int | float]:
    """Return the perplexity of documents per token, word and byte, each token scored once in rolling windows.

    exp(−Σ log p(token | the tokens before it in its window) / count), the count that of tokens, of words (as
    blanks part them) or of UTF-8 bytes.  A document's first token follows the beginning-of-text token, or the
    end-of-text token where there is none.  A window reads ``length`` tokens, and each but a document's first
    scores its last ``stride``, by default all: that is lm_eval's rolling likelihood, while a smaller stride
    leaves every token at least length − stride tokens of context.  The last window of a document reaches back
    to be full.  ``batch`` windows at a time, the likelihood in float32, on the model's device.

    Returns {"token_perplexity", "word_perplexity", "byte_perplexity", "tokens", "words", "bytes", "documents",
    "length", "stride"}.  SpecError if the window does not fit the model or the stride the window, DataError if
    there is nothing to score.  Cost: tokens · length / stride tokens through the model.

    >>> from s3lab.models.text.reference import load_reference
    >>> result = evaluate(*load_reference(), "The with statement wraps a block.", length=8, stride=4)
    >>> result["words"], result["bytes"], result["word_perplexity"] > result["byte_perplexity"]
    (6, 33, True)
    """
    documents = [documents] if isinstance(documents, str) else list(documents)
    stride = length if stride is None else stride
    check_window(model, length, stride, batch)
    encoded = [tokenizer.encode(document, verbose=False) for document in documents]
    counts = {
        "token": sum(map(len, encoded)),
        "word": sum(len(re.split(r"\s+", document)) for document in documents),
        "byte": sum(len(document.encode()) for document in documents),
    }
    if not counts["token"]:
        raise DataError(f"{len(documents)} documents without a token leave nothing to score: give some text")
    prefix = _find_prefix(tokenizer)
    rows = [row for ids in encoded for row in _cut(torch.tensor([prefix, *ids]), length, stride)]
    with evaluating(model):
        loss = torch.stack([_score(model, rows[i : i + batch]) for i in range(0, len(rows), batch)]).sum()
    return {
        **{f"{unit}_perplexity": (loss / count).exp().item() for unit, count in counts.items()},
        **{f"{unit}s": count for unit, count in counts.items()},
        "documents": len(documents),
        "length": length,
        "stride": stride,
    }


def evaluate_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: str | Sequence[str] = (),
    *,
    tasks: Sequence[str] = (),
    length: int = 256,
    batch: int = 8,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Return what lm_eval measures on documents and on its own tasks, as {task: {metric: value}}.

    The documents are the task "text", of rolling likelihood over windows of ``length`` tokens: its metrics
    word_perplexity, byte_perplexity and bits_per_byte need no network.  ``tasks`` are lm_eval's names
    ("wikitext", "hellaswag", …), with as many examples in the prompt as the task itself asks for, mostly none,
    on the first ``limit`` documents each, or all; their data come from the Hugging Face hub or its local cache.
    The softmax is in float32 whatever the model's dtype.

    DataError if there is nothing to measure, or a task is unknown to lm_eval or its data cannot be had.

    >>> from s3lab.models.text.reference import load_reference
    >>> evaluate_lm_eval(*load_reference(), "The with statement wraps a block.")["text"].keys()
    dict_keys(['word_perplexity', 'byte_perplexity', 'bits_per_byte'])
    """
    documents = [documents] if isinstance(documents, str) else list(documents)
    if not documents and not tasks:
        raise DataError("no documents and no tasks leave nothing to measure: give one or the other")
    check_window(model, length, length, batch)
    manager = _index_tasks(bool(tasks))
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise DataError(f"lm_eval knows no task {', '.join(unknown)}: `lm_eval ls tasks` lists its names")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with evaluating(model):
            found = simple_evaluate(
                # lm_eval gives the tokenizer a padding token: the caller's stays as it is.
                HFLM(
                    model,  # pyright: ignore[reportCallIssue]
                    backend="causal",
                    tokenizer=deepcopy(tokenizer),
                    max_length=length,
                    batch_size=batch,
                    softmax_dtype=torch.float32,
                ),
                tasks=[*([_define_task(documents)] if documents else []), *tasks],  # pyright: ignore[reportCallIssue]
                task_manager=manager,  # pyright: ignore[reportCallIssue]
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
                random_seed=None,  # type: ignore[arg-type]  # no generator is seeded anew
                numpy_random_seed=None,  # type: ignore[arg-type]
                torch_random_seed=None,  # type: ignore[arg-type]
            )
    except OSError as error:
        raise DataError(
            f"the data of {', '.join(tasks)} cannot be read ({str(error).splitlines()[0]}): without a network, "
            "evaluate documents of a local file or of 'stdlib' instead, or run once with a network to fill the cache"
        ) from error
    return {task: _pick_metrics(values) for task, values in found["results"].items()}  # type: ignore[index]


def windows(count: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first, scored, end) of the windows over ``count`` tokens: it reads [first, end), scores [scored, end).

    >>> list(windows(9, length=4, stride=2))
    [(0, 0, 4), (2, 4, 6), (4, 6, 8), (5, 8, 9)]
    >>> list(windows(9, length=4, stride=4))
    [(0, 0, 4), (4, 4, 8), (5, 8, 9)]
    """
    scored = 0
    while scored < count:
        end = min(count, scored + (stride if scored else length))
        yield max(0, end - length), scored, end
        scored = end


def _cut(ids: Tensor, length: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of inputs and targets, one of each a token; ids begin with a token that is never a target."""
    for first, scored, end in windows(len(ids) - 1, length, stride):
        targets = ids[first + 1 : end + 1].clone()
        targets[: scored - first] = _UNSCORED
        yield ids[first:end], targets


@torch.inference_mode()
def _score(model: PreTrainedModel, rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    # Padding on the right needs no attention mask: no scored token can see it.
    device = next(model.parameters()).device
    inputs = pad_sequence([row for row, _ in rows], batch_first=True).to(device)
    targets = pad_sequence([row for _, row in rows], batch_first=True, padding_value=_UNSCORED).to(device)
    chosen = targets != _UNSCORED
    logits = model(input_ids=inputs, use_cache=False).logits[chosen]
    return cross_entropy(logits.float(), targets[chosen], reduction="none").double().sum().cpu()


def check_window(model: PreTrainedModel, length: int, stride: int, batch: int) -> None:
    """Raise SpecError for windows that the model cannot read, that leave tokens out, or none at a time."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    if not 1 <= length <= positions:
        raise SpecError(f"a window of length={length} does not fit the model: take 1 to {positions} tokens")
    if not 1 <= stride <= length:
        raise SpecError(f"stride={stride} is not between 1 and length={length}, so tokens would go unscored")
    if batch < 1:
        raise SpecError(f"batch={batch} holds no window: take at least 1")


def _find_prefix(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise DataError("the tokenizer has no beginning- or end-of-text token to begin with: set its bos_token")


@cache
def _index_tasks(own: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=own)  # with them, ten seconds once a process


def _define_task(documents: list[str]) -> dict[str, Any]:
    from datasets import Dataset

    aggregations = {
        "word_perplexity": "weighted_perplexity",
        "byte_perplexity": "weighted_perplexity",
        "bits_per_byte": "bits_per_byte",
    }
    return {
        "task": "text",
        "custom_dataset": lambda **_: {"test": Dataset.from_dict({"text": documents})},
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "text",  # the column itself: a template would read "[…]" as a list
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in aggregations.items()
        ],
        "metadata": {"version": 1.0},
    }


def _pick_metrics(values: dict[str, Any]) -> dict[str, float]:
    """Numbers only, named "metric" or, where lm_eval filtered the answers, "metric,filter"."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }
