"""What a model learns from: the next token of a text, and the logits and hidden states of a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from s3lab.errors import DataError
from s3lab.shapes import Integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Term = Literal["text", "logits", "hidden"]
TERMS: tuple[str, ...] = get_args(Term)


def find_loss(
    model: PreTrainedModel, teacher: PreTrainedModel | None, ids: Integer[Tensor, "N L"], terms: Sequence[str]
) -> Tensor:
    """Return the sum of the terms of the loss of sequences, a scalar that autograd follows to the model.

    "text" is the mean −log p of each next token; "logits" the mean KL(teacher ‖ model) of the distributions at each
    token; "hidden" Σ_l ‖h_l − t_l‖² / ‖t_l‖² over the hidden states behind the decoder layers l, by their number.
    The teacher is given no gradient, and its own dtype.

    Source: Hinton, Vinyals and Dean, 2015, at temperature 1; hidden states: Kurtic et al., *Sparse fine-tuning for
    inference acceleration of large language models*, 2023, whose norm is of each token, and here of all.
    """
    hidden = "hidden" in terms
    out = model(input_ids=ids, use_cache=False, output_hidden_states=hidden)
    losses = []
    if "text" in terms:
        losses.append(functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))
    if teacher is not None:
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            goal = teacher(input_ids=ids, use_cache=False, output_hidden_states=hidden)
        if "logits" in terms:
            ours, theirs = (
                functional.log_softmax(logits.flatten(0, 1).float(), -1) for logits in (out.logits, goal.logits)
            )
            losses.append(functional.kl_div(ours, theirs, reduction="batchmean", log_target=True))
        if hidden:
            pairs = [(h.float(), t.float()) for h, t in zip(out.hidden_states[1:], goal.hidden_states[1:], strict=True)]
            apart = [(h - t).square().sum() / t.square().sum() for h, t in pairs]
            losses.append(torch.stack(apart).mean())
    return torch.stack(losses).sum()


def check_terms(model: PreTrainedModel, teacher: PreTrainedModel | None, terms: Sequence[str]) -> None:
    """Raise DataError for terms that are none, want a teacher that is not there, or one of other sizes."""
    if not terms or (wrong := [term for term in terms if term not in TERMS]):
        raise DataError(f"the loss {', '.join(wrong) if terms else 'of no terms'} is none: sum {', '.join(TERMS)}")
    taught = [term for term in terms if term != "text"]
    if taught and teacher is None:
        raise DataError(f"the loss {', '.join(taught)} is of a teacher, and there is none: give the dense model")
    if teacher is None:
        return
    if not taught:
        raise DataError("a teacher is given, and the loss is of the text alone: add logits or hidden to the loss")
    for term, name in (("logits", "vocab_size"), ("hidden", "hidden_size"), ("hidden", "num_hidden_layers")):
        own, other = (getattr(m.config.get_text_config(), name) for m in (model, teacher))
        if term in terms and own != other:
            raise DataError(f"the teacher has {name}={other} and the model {own}: give the model before its pruning")
