"""Linear layers that prune their inputs token by token: put on, taken off, saved beside a model and loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args

from torch import Tensor, nn
from torch.nn.functional import linear

from s3lab.algebra.patterns import parse
from s3lab.errors import DataError, SpecError
from s3lab.files import replacing, write
from s3lab.models.structure.capture import find_linears
from s3lab.models.structure.decoder import find_decoder
from s3lab.shapes import Float
from s3lab.solvers.kernels import Impl, check_impl, prune_tokens
from s3lab.tensors.activation import bind_token

Criterion = Literal["act", "clact", "amber"]
Shift = Literal["median", "mean", "channel", "layer", "learned"]
TENSORS, SETTINGS = "activations.safetensors", "activations.json"


@dataclass(frozen=True)
class Activation:
    """How a linear layer y = W x + b prunes its input x token by token, and what makes up for it.

        y = (1 + s) ⊙ (W x̂ + A B (x − x̂)) + b,    x̂ = η + ν · mask ⊙ (x − η)

    The mask keeps in each scope of ``spec`` the blocks with the highest sums of |x − η| ⊙ f, f by ``criterion``:

    - "act": 1;
    - "clact": the root mean squares of the features on calibration text.  The paper divides each by the token's own
      norm, which is the same for all that compete and changes no choice, and takes the norms of the sequence at hand:
      there a token would be pruned otherwise in a prompt than beside a cache, so that they are fixed here, our reading;
    - "amber": the norms of the columns of W without its outliers, `s3lab.tensors.activation.weigh_columns`.

    ``shift`` η is none, each token's "median" or "mean" (D-PTS), fixed to the mean of each feature ("channel") or of
    all ("layer") on calibration text (S-PTS), or "learned" for each feature (L-PTS).  ``variance`` (VAR): ν gives each
    token's x̂ − η the variance of its x − η, else 1.  ``scale`` (LS): s is learned for each output, else 0; the bias
    is not scaled, our reading.  ``rank`` (R-Sparse): that of A B, the nearest matrix to W, else 0.  All combine.

    Raises SpecError for a spec that cannot be read or an unknown option, SolveError for an unknown ``impl``, which
    `s3lab.solvers.kernels.prune_tokens` explains.  Source: arXiv 2509.22166.

    >>> Activation("8:16", shift="median", variance=True).needs_text, Activation("8:16", "clact").needs_text
    (False, True)
    """

    spec: str
    criterion: Criterion = "act"
    shift: Shift | None = None
    variance: bool = False
    scale: bool = False
    rank: int = 0
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        parse(self.spec)
        check_impl(self.impl)
        for name, value, known in (("criterion", self.criterion, Criterion), ("shift", self.shift, Shift)):
            if value not in get_args(known) and not (name == "shift" and value is None):
                raise SpecError(f"{name}={value!r}: use one of {', '.join(get_args(known))}")
        if not isinstance(self.rank, int) or self.rank < 0:
            raise SpecError(f"rank={self.rank!r}: give the rank of the residual, 0 for none")

    @property
    def needs_text(self) -> bool:
        """Whether something is to be measured or learned on calibration text."""
        return self.criterion == "clact" or self.shift in ("channel", "layer", "learned") or self.scale

    @property
    def learns(self) -> bool:
        """Whether something is to be learned."""
        return self.shift == "learned" or self.scale

    def shapes(self, M: int, K: int) -> dict[str, tuple[int, ...]]:
        """Return the tensors that a layer (M, K) needs for this, by name, and their shapes.

        >>> Activation("2:4", "amber", scale=True).shapes(8, 16)
        {'factor': (16,), 'scale': (8,)}
        """
        return {
            **({"factor": (K,)} if self.criterion != "act" else {}),
            **({"shift": (K,)} if self.shift in ("channel", "layer", "learned") else {}),
            **({"scale": (M,)} if self.scale else {}),
            **({"left": (M, self.rank), "right": (self.rank, K)} if self.rank else {}),
        }


class Pruner(nn.Module):
    """What a linear layer (M, K) has beside weight and bias: an `Activation` and its tensors, which move with it.

    The tensors are buffers that are no part of the model's state: ``factor`` f (K,), ``shift`` η (K,), ``scale`` s
    (M,), and ``left`` A (M, r), ``right`` B (r, K), each None where there is no such part.  Raises DataError where
    they are not those that the `Activation` needs, SpecError where its spec does not fit K features.
    """

    factor: Tensor | None
    shift: Tensor | None
    scale: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def __init__(self, activation: Activation, shape: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        M, K = shape
        needed, given = activation.shapes(M, K), {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if given != needed:
            raise DataError(f"{activation} of a layer ({M}, {K}) needs {needed or 'no tensor'}, not {given}")
        self.activation = activation
        self.shape = (M, K)
        self.part = bind_token(parse(activation.spec), K)
        for name in ("factor", "shift", "scale", "left", "right"):
            self.register_buffer(name, tensors.get(name), persistent=False)

    def prune(self, x: Float[Tensor, "... K"]) -> Float[Tensor, "... K"]:
        """Return the input that is left, x̂."""
        chosen = self.activation
        centre = chosen.shift if chosen.shift in ("median", "mean") else self.shift
        learning = self.shift is not None and self.shift.requires_grad
        return prune_tokens(x, self.part, self.factor, centre, chosen.variance, "torch" if learning else chosen.impl)

    def apply_to(self, x: Float[Tensor, "... K"], W: Float[Tensor, "M K"], bias: Tensor | None) -> Tensor:
        """Return y (..., M)."""
        pruned = self.prune(x)
        y = linear(pruned, W)
        if self.left is not None and self.right is not None:
            y = y + linear(linear(x - pruned, self.right.to(x.dtype)), self.left.to(x.dtype))
        if self.scale is not None:
            y = y * (1 + self.scale).to(y.dtype)
        return y if bias is None else y + bias


class SparseLinear(nn.Linear):
    """A linear layer whose input a `Pruner` prunes; it becomes one, and a plain one again, in its place."""

    pruner: Pruner

    def forward(self, input: Tensor) -> Tensor:
        """Return the output for the pruned input."""
        return self.pruner.apply_to(input, self.weight, self.bias)


@dataclass
class Sparsified:
    """Layers that prune their inputs, until `remove` or the end of a ``with`` block."""

    layers: dict[str, SparseLinear] = field(default_factory=dict)

    def add(self, name: str, layer: nn.Linear, pruner: Pruner) -> None:
        """Let a plain linear layer prune its input from now on."""
        layer.__class__ = SparseLinear
        assert isinstance(layer, SparseLinear)
        layer.pruner = pruner.to(layer.weight.device)
        self.layers[name] = layer

    def remove(self) -> None:
        """Make the layers plain again, with the weights that they have now."""
        while self.layers:
            _, layer = self.layers.popitem()
            del layer.pruner
            layer.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]

    def __enter__(self) -> Sparsified:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()


def attach(model: nn.Module, pruners: Mapping[str, Pruner]) -> Sparsified:
    """Let the layers of these names prune their inputs, all or none of them.

    Raises DataError for a name that is no plain linear layer of the model, or one of another shape.
    """
    layers = {name: find_plain(model, name) for name in pruners}
    for name, layer in layers.items():
        if tuple(layer.weight.shape) != (shape := pruners[name].shape):
            raise DataError(
                f"{name} is {tuple(layer.weight.shape)}, and its pruning is of {shape}: give the same model"
            )
    sparsified = Sparsified()
    for name, layer in layers.items():
        sparsified.add(name, layer, pruners[name])
    return sparsified


def find_plain(model: nn.Module, name: str) -> nn.Linear:
    """Return the linear layer of a name; DataError where there is none, or one that is not plain."""
    layer = dict(model.named_modules()).get(name)
    if isinstance(layer, SparseLinear):
        raise DataError(f"{name} prunes its input already, by {layer.pruner.activation.spec}: remove that first")
    if type(layer) is not nn.Linear:
        kind = "no part of the model" if layer is None else f"a {type(layer).__name__} and no plain nn.Linear"
        raise DataError(f"{name} is {kind}: its input cannot be pruned; choose other layers")
    return layer


def choose_linears(model: nn.Module, layers: str | Sequence[str] | None) -> dict[str, nn.Linear]:
    """Return the linear layers whose names match the globs, by default all in the repeated layers of the model."""
    return find_linears(model, f"{find_decoder(model).name}.*" if layers is None else layers)


def save(model: nn.Module, folder: str | Path) -> Path:
    """Save how the layers of a model prune their inputs, in two files beside its own, and return the folder.

    ``activations.safetensors`` holds the tensors, ``activations.json`` the settings by layer.  Raises DataError where
    no layer prunes its input.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    pruners = {name: m.pruner for name, m in model.named_modules() if isinstance(m, SparseLinear)}
    if not pruners:
        raise DataError(f"no layer of {type(model).__name__} prunes its input: sparsify it first")
    tensors = {f"{name}.{key}": t.contiguous() for name, pruner in pruners.items() for key, t in pruner.named_buffers()}
    with replacing(folder / TENSORS) as part:
        save_file(tensors, part)
    settings = {name: {"shape": pruner.shape, **asdict(pruner.activation)} for name, pruner in pruners.items()}
    write(folder / SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
    return folder


def load(model: nn.Module, folder: str | Path) -> Sparsified:
    """Let the layers of a model prune their inputs as those of the one did that `save` was given.

    Raises DataError where the files are missing or not as written, or are of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        settings = json.loads((folder / SETTINGS).read_text())
        tensors = load_file(folder / TENSORS)
        shapes = {name: given.pop("shape") for name, given in settings.items()}
        chosen = {name: Activation(**given) for name, given in settings.items()}
    except (OSError, json.JSONDecodeError, SafetensorError, TypeError, KeyError) as error:
        raise DataError(f"{str(folder)!r} holds no saved pruning of inputs ({error}): save one there first") from error
    own: dict[str, dict[str, Tensor]] = {name: {} for name in chosen}
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(".")
        own.setdefault(name, {})[kind] = tensor
    return attach(model, {name: Pruner(chosen[name], shapes[name], own[name]) for name in chosen})
