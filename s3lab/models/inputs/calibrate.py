"""What the pruning of inputs needs to know of them: measured, or learned layer by layer, on calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from s3lab.errors import DataError, SpecError
from s3lab.models.inputs.activations import Activation, Pruner, Sparsified, attach, choose_linears, find_plain
from s3lab.shapes import Float, Integer
from s3lab.tensors.activation import split_low_rank, weigh_columns


@dataclass(frozen=True)
class Learning:
    """How shifts and scales are learned: AdamW at a rate ``lr``, ``steps`` times on ``tokens`` drawn with ``seed``.

    The rate falls along half a cosine; that of a shift is in units of the inputs' root mean square.  The inputs of
    ``at_once`` layers are held at a time.  Raises SpecError unless all are positive.
    """

    steps: int = 100
    lr: float = 1e-2
    tokens: int = 512
    at_once: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "tokens", "at_once"):
            if not (value := getattr(self, name)) > 0:
                raise SpecError(f"{name}={value!r} learns nothing: give more than 0")


def sparsify(
    model: nn.Module,
    activation: Activation | str,
    layers: str | Sequence[str] | None = None,
    calibration: Integer[Tensor, "N L"] | None = None,
    *,
    learning: Learning | None = None,
    batch: int = 8,
) -> Sparsified:
    """Let linear layers of a model prune their inputs, and return what takes that back.

    ``activation`` is for all layers whose dotted names match the globs ``layers``, by default all in the repeated
    layers of a language model and not its head; further calls add others.  ``calibration`` (N, L) are sequences of
    tokens without padding, on which the inputs of the dense layers are measured, ``batch`` sequences at a time, and
    what is learned is learned as `learn` says.  A token is pruned by what is fixed and by its own features alone: in
    a prompt, beside padding, and decoded with a cache alike.

    The weights stay as they are, and so do the model's state and mode.  ``save`` and ``load`` of
    `s3lab.models.inputs.activations` keep it beside the model.  Raises DataError where calibration text
    is needed and missing, or a layer cannot be; SpecError for a spec that does not fit the inputs of a layer, naming
    it.

    >>> model = nn.Sequential(nn.Linear(4, 1, bias=False))
    >>> _ = model[0].weight.data.fill_(1.0)
    >>> with sparsify(model, "1:4", "0"):
    ...     model(torch.tensor([[1.0, 5.0, 2.0, 3.0]])).item()
    5.0
    >>> model(torch.tensor([[1.0, 5.0, 2.0, 3.0]])).item()
    11.0
    """
    activation = Activation(activation) if isinstance(activation, str) else activation
    chosen = {name: find_plain(model, name) for name in choose_linears(model, layers)}
    if activation.needs_text and (calibration is None or not calibration.numel()):
        raise DataError(f"{activation} measures or learns on calibration text: give sequences of tokens (N, L)")
    moments: dict[str, Inputs] = {}
    if activation.needs_text and calibration is not None:
        moments = measure_inputs(model, chosen, calibration, batch)
    pruners = {name: _make(name, activation, layer, moments.get(name)) for name, layer in chosen.items()}
    if activation.learns and calibration is not None:
        learning = learning or Learning()
        names = iter(chosen)
        while some := {name: chosen[name] for name in islice(names, learning.at_once)}:
            for name, X in collect_inputs(model, some, calibration, batch).items():
                learn(pruners[name], chosen[name], X, learning)
    return attach(model, pruners)


@dataclass
class Inputs:
    """Means and mean squares of the features of a layer's inputs, over ``tokens`` of them."""

    mean: Tensor
    square: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, layer: nn.Linear) -> Inputs:
        """Return those of a layer that has seen none yet."""
        mean, square = torch.zeros(2, layer.in_features, dtype=torch.float64, device=layer.weight.device)
        return cls(mean, square)

    def add(self, X: Float[Tensor, "T K"]) -> None:
        """Take in a batch of tokens."""
        self.tokens += len(X)
        weight = len(X) / self.tokens
        self.mean += weight * (X.double().mean(0) - self.mean)
        self.square += weight * (X.double().square().mean(0) - self.square)


def measure_inputs(
    model: nn.Module, layers: dict[str, nn.Linear], ids: Integer[Tensor, "N L"], batch: int = 8
) -> dict[str, Inputs]:
    """Return means and mean squares of the features of the layers' inputs over N sequences of L tokens."""
    found = {name: Inputs.of(layer) for name, layer in layers.items()}
    with _seeing(layers, lambda name, X: found[name].add(X) if len(X) else None):
        _run(model, ids, batch)
    return _expect_all(found, {name: inputs.tokens for name, inputs in found.items()})


def collect_inputs(
    model: nn.Module, layers: dict[str, nn.Linear], ids: Integer[Tensor, "N L"], batch: int = 8
) -> dict[str, Tensor]:
    """Return the inputs (T, K) of the layers over N sequences of L tokens."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    with _seeing(layers, lambda name, X: found[name].append(X)):
        _run(model, ids, batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


def learn(pruner: Pruner, layer: nn.Linear, X: Float[Tensor, "T K"], learning: Learning) -> None:
    """Learn the shift and the scale of a layer on its inputs (T, K), where its `Activation` asks for them.

    min ‖y(X) − (X Wᵀ + b)‖² by AdamW from zero, on inputs of the dense model; what does not lower that mean over all
    of X stays zero.  The weight stays as it is.  Cost: about 6·M·K operations a token and step.
    """
    X, W = X.float(), layer.weight.detach().float()
    Y = linear(X, W)
    parts = {
        name: torch.zeros_like(tensor, dtype=torch.float32).requires_grad_()
        for name, tensor, learned in (
            ("shift", pruner.shift, pruner.activation.shift == "learned"),
            ("scale", pruner.scale, pruner.activation.scale),
        )
        if learned and tensor is not None
    }
    unit = X.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny).item()
    groups = [{"params": [part], "lr": learning.lr * (unit if name == "shift" else 1)} for name, part in parts.items()]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, learning.steps)
    generator = torch.Generator().manual_seed(learning.seed)

    def miss(tokens: Tensor | slice = slice(None)) -> Tensor:
        return (pruner.apply_to(X[tokens], W, None) - Y[tokens]).square().mean()

    with torch.no_grad():
        _set(pruner, {name: part.detach() for name, part in parts.items()})
        before = miss()
    with torch.enable_grad():
        _set(pruner, parts)
        for _ in range(learning.steps):
            some = torch.randint(len(X), (min(learning.tokens, len(X)),), generator=generator).to(X.device)
            optimizer.zero_grad()
            (miss(some) / before.clamp(min=torch.finfo(torch.float32).tiny)).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        _set(pruner, {name: part.detach() for name, part in parts.items()})
        if not miss() < before:
            _set(pruner, {name: torch.zeros_like(part) for name, part in parts.items()})


def _set(pruner: Pruner, parts: dict[str, Tensor]) -> None:
    for name, part in parts.items():
        setattr(pruner, name, part)


def _make(name: str, activation: Activation, layer: nn.Linear, inputs: Inputs | None) -> Pruner:
    """The pruner of a layer, what is to be learned zero."""
    W = layer.weight.detach()
    tensors: dict[str, Tensor] = {}
    try:
        if activation.criterion == "amber":
            tensors["factor"] = weigh_columns(W)
        if inputs is not None and activation.criterion == "clact":
            tensors["factor"] = inputs.square.sqrt().float()
        if inputs is not None and activation.shift in ("channel", "layer"):
            mean = inputs.mean.float()
            tensors["shift"] = mean if activation.shift == "channel" else mean.mean().expand_as(mean).contiguous()
        if activation.shift == "learned":
            tensors["shift"] = W.new_zeros(layer.in_features, dtype=torch.float32)
        if activation.scale:
            tensors["scale"] = W.new_zeros(layer.out_features, dtype=torch.float32)
        if activation.rank:
            tensors["left"], tensors["right"] = split_low_rank(W, activation.rank)
        return Pruner(activation, W.shape, tensors)
    except SpecError as error:
        raise SpecError(f"{name}: {error}") from error


@contextmanager
def _seeing(layers: dict[str, nn.Linear], see: Callable[[str, Tensor], object]) -> Iterator[None]:
    """While active, ``see`` is told the inputs (T, K) of each forward pass of the layers."""

    def tell(name: str) -> Callable[..., None]:
        def hear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            see(name, inputs[0].detach().flatten(0, -2))

        return hear

    hooks = [layer.register_forward_pre_hook(tell(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _run(model: nn.Module, ids: Tensor, batch: int) -> None:
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad():
            for rows in ids.split(batch):
                model(input_ids=rows.to(device), use_cache=False)
    finally:
        model.train(training)


def _expect_all(found: dict[str, Inputs], tokens: dict[str, int]) -> dict[str, Inputs]:
    if blind := [name for name, count in tokens.items() if not count]:
        raise DataError(f"no calibration token reached {', '.join(blind[:4])}: give more text, or leave them out")
    return found
