"""The inputs of linear layers, caught by hooks and reduced to second moments as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from s3lab.errors import DataError
from s3lab.shapes import Integer
from s3lab.tensors.hessian import Moment

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def find_linears(model: nn.Module, patterns: str | Sequence[str] = "*") -> dict[str, nn.Linear]:
    """Return the linear layers whose dotted names match one of the globs, in the model's order.

    Raises DataError for a glob that matches none, naming the layers that there are.

    >>> list(find_linears(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), "2"))
    ['2']
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise DataError(f"no linear layer is called {pattern!r}; there are {', '.join(linears) or 'none'}")
    return {name: m for name, m in linears.items() if any(fnmatchcase(name, p) for p in patterns)}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, and then in the mode it was in.

    >>> model = nn.Dropout()
    >>> with evaluating(model):
    ...     print(model.training)
    False
    >>> model.training
    True
    """
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def accumulate(layers: dict[str, nn.Linear]) -> Iterator[dict[str, Moment]]:
    """Collect the second moment of each layer's inputs during the forward passes inside the block."""
    moments = {name: Moment() for name in layers}

    def feed(moment: Moment) -> Callable[..., None]:
        return lambda _, inputs: moment.add(inputs[0])

    hooks = [layer.register_forward_pre_hook(feed(moments[name])) for name, layer in layers.items()]
    try:
        yield moments
    finally:
        for hook in hooks:
            hook.remove()


def capture_moments(
    model: PreTrainedModel, ids: Integer[Tensor, "N L"], patterns: str | Sequence[str], batch: int = 8
) -> dict[str, Moment]:
    """Return the second moments of the inputs of the layers that match the globs, over N sequences of L tokens.

    ``batch`` sequences at a time; no activation outlives its forward pass.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), accumulate(find_linears(model, patterns)) as moments:
        for rows in ids.split(batch):
            model(input_ids=rows.to(device), use_cache=False)
    return moments
