"""A masked model as a smaller dense one: whole channels, heads and groups of heads that are zero, taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from s3lab.algebra.coupled import CoupledPartition
from s3lab.errors import DataError, SpecError
from s3lab.models.structure.decoder import Decoder, Matrix, find_decoder
from s3lab.models.structure.structures import fit, head_sizes, read_couplings

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner")  # what configs call the number of MLP channels
_Lines = tuple[Tensor, Tensor]  # which rows and which columns of a matrix stay, bool (M,) and (K,)


@dataclass(frozen=True)
class Shrunk:
    """What `shrink` did: the sizes of the config that changed, and the number of parameters, each before and after."""

    sizes: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]

    def __str__(self) -> str:
        told = [f"{name} {before} → {after}" for name, (before, after) in self.sizes.items()]
        return ", ".join([*told, f"parameters {self.parameters[0]:,} → {self.parameters[1]:,}"])


@torch.no_grad()
def shrink(model: PreTrainedModel, *, pad: bool = False) -> Shrunk:
    """Rewrite the decoder layers of a model as smaller dense ones, in place, and return what became smaller.

    An MLP channel goes whose column of the second matrix is zero, a group of heads whose columns of the output
    projection are, and then, where each group loses as many, a head: whatever their rows hold, biases among them, the
    outputs are the same to rounding.  The config says the new sizes, so that a saved model is loaded as any other.

    A config has one size for all layers.  Where layers are left with different numbers, ``pad`` keeps zero channels and
    heads up to the largest.

    Raises DataError, and leaves the model as it was, for different numbers without ``pad``, and where the architecture
    has no room for the new sizes, such as one that takes a head to be the hidden size by the number of heads.
    Cost: one more copy of the matrices, and a model without memory for its weights.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    >>> for layer in model.model.layers:
    ...     _ = layer.mlp.down_proj.weight.data[:, ::2].zero_()
    >>> print(shrink(model), model.model.layers[0].mlp.gate_proj)
    intermediate_size 32 → 16, parameters 7,248 → 5,712 Linear(in_features=16, out_features=16, bias=False)
    """
    decoder, parameters = find_decoder(model), _count(model)
    lines, sizes = _plan(model, decoder, pad)
    changed = {key: (before, after) for key, (before, after) in sizes.items() if before != after}
    if not changed:
        return Shrunk({}, (parameters, parameters))
    config = deepcopy(model.config)
    told = {key: after for key, (_, after) in changed.items()}
    if "num_attention_heads" in told:
        told["head_dim"] = head_sizes(model.config)["head"]
    _set_sizes(config, told)
    fresh = _build(model, config)
    matrices = {name: matrix for own in decoder.matrices for name, matrix in own.items() if name in lines}
    _check_room(model, fresh, matrices, lines, told)
    for name, matrix in matrices.items():
        _cut(matrix, *lines[name])
    for name, module in fresh.named_modules():  # what modules remember of their sizes
        vars(model.get_submodule(name)).update({key: n for key, n in vars(module).items() if type(n) is int})
    _set_sizes(model.config, told)
    return Shrunk(changed, (parameters, _count(model)))


def _plan(model: PreTrainedModel, decoder: Decoder, pad: bool) -> tuple[dict[str, _Lines], dict[str, tuple[int, int]]]:
    """What stays of which matrix, by full name, and the sizes of the config before and after."""
    text, lines, sizes = model.config.get_text_config(), {}, {}
    places = [f"layer {index}" for index in range(len(decoder.layers))]
    if layers := _bind(model, decoder, "mlp-channels"):
        stay = _level([layer.live for layer in layers], places, "channels of the MLP", pad)
        sizes[next((key for key in _WIDTHS if hasattr(text, key)), _WIDTHS[0])] = len(stay[0]), int(stay[0].sum())
        lines |= _lines(layers, stay)
    groups, heads = (_bind(model, decoder, name) for name in ("kv-groups", "attention-heads"))
    if groups and heads:
        stay = _level([layer.live for layer in groups], places, "groups of heads", pad)
        of_heads = _level_heads([layer.live for layer in heads], stay, pad)
        if hasattr(text, "num_key_value_heads"):
            sizes["num_key_value_heads"] = len(stay[0]), int(stay[0].sum())
        sizes["num_attention_heads"] = len(of_heads[0]), int(of_heads[0].sum())
        lines |= _lines(groups, stay) | _lines(heads, of_heads)
    return lines, sizes


@dataclass(frozen=True, eq=False)
class _Bound:
    """A structure on the matrices of one layer."""

    bound: CoupledPartition
    members: Mapping[str, Matrix]

    @property
    def live(self) -> Tensor:
        """Which blocks of the leaders are not zero, bool (B,)."""
        return self.bound.cost({name: (self.members[name].weight != 0).float() for name in self.bound.leaders})[0] > 0


def _bind(model: PreTrainedModel, decoder: Decoder, structure: str) -> list[_Bound]:
    """A structure on each layer, none if there is a layer that has it not."""
    found = []
    try:
        couplings = read_couplings(f"{structure} keep 1", model.config)
        for index, matrices in enumerate(decoder.matrices):
            coupling, members = fit(couplings, matrices, f"{decoder.name}.{index}")
            shapes = {name: (m.weight.shape[0], m.weight.shape[1]) for name, m in members.items()}
            found.append(_Bound(coupling.bind(shapes), members))
    except SpecError:
        return []
    return found


def _level(live: Sequence[Tensor], places: Sequence[str], what: str, pad: bool) -> list[Tensor]:
    """Which blocks stay, equally many everywhere: those that live, and then the first of the others."""
    counts = [int(own.sum()) for own in live]
    most, least = counts.index(max(counts)), counts.index(min(counts))
    if counts[most] != counts[least] and not pad:
        raise DataError(
            f"{what}: {counts[most]} of {places[most]} are not zero and {counts[least]} of {places[least]}, and a "
            "config has one number for all: prune equally many, or give pad=True to keep zero ones up to the largest"
        )
    stay = [torch.zeros_like(own) for own in live]
    for own, kept in zip(live, stay, strict=True):
        kept[own.long().argsort(descending=True, stable=True)[: max(counts[most], 1)]] = True
    return stay


def _level_heads(live: Sequence[Tensor], groups: Sequence[Tensor], pad: bool) -> list[Tensor]:
    """Which heads stay in each layer, equally many in each group that stays."""
    at = [(layer, int(group)) for layer, stay in enumerate(groups) for group in stay.nonzero()]
    own = [live[layer].view(len(groups[layer]), -1)[group] for layer, group in at]
    kept = _level(own, [f"group {group} of layer {layer}" for layer, group in at], "heads", pad)
    stay = [torch.zeros_like(heads).view(len(found), -1) for heads, found in zip(live, groups, strict=True)]
    for (layer, group), heads in zip(at, kept, strict=True):
        stay[layer][group] = heads
    return [heads.flatten() for heads in stay]


def _lines(layers: Sequence[_Bound], stay: Sequence[Tensor]) -> dict[str, _Lines]:
    """Which rows and columns the blocks that stay leave of each matrix, by full name."""
    lines = {}
    for layer, kept in zip(layers, stay, strict=True):
        for name, mask in layer.bound.scatter(kept[None]).items():
            lines[layer.members[name].name] = mask.any(1), mask.any(0)
    return lines


def _set_sizes(config: PretrainedConfig, sizes: Mapping[str, int]) -> None:
    for key, size in sizes.items():
        setattr(config.get_text_config(), key, size)


def _build(model: PreTrainedModel, config: PretrainedConfig) -> nn.Module:
    """The model that transformers makes of a config as it reads it from a file, without memory for its weights."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with torch.device("meta"):
            return type(model)(type(config).from_dict(config.to_dict()))
    except (ValueError, StrictDataclassError) as error:
        told = " ".join(str(error).split())
        raise DataError(f"{type(model).__name__} has no room for the smaller sizes: {told}") from error


def _check_room(
    model: nn.Module,
    fresh: nn.Module,
    matrices: Mapping[str, Matrix],
    lines: Mapping[str, _Lines],
    sizes: Mapping[str, int],
) -> None:
    """Raise DataError unless a model of the new config has parameters and buffers of just the shapes that are left."""
    left = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    for name, matrix in matrices.items():
        rows, columns = (int(stay.sum()) for stay in lines[name])
        left[f"{name}.{matrix.parameter}"] = (columns, rows) if matrix.transposed else (rows, columns)
        if f"{name}.bias" in left:
            left[f"{name}.bias"] = (rows,)
    for name, tensor in _tensors(fresh).items():
        if left.get(name) != tuple(tensor.shape):
            told = ", ".join(f"{key} = {size}" for key, size in sizes.items())
            raise DataError(
                f"{type(model).__name__} has no room for the smaller sizes: with {told} it has {name} of "
                f"{tuple(tensor.shape)}, and {left.get(name)} is left: keep the model masked"
            )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _cut(matrix: Matrix, rows: Tensor, columns: Tensor) -> None:
    """Leave these rows and columns of a matrix, and these rows of its bias."""
    module, W = matrix.module, matrix.weight[rows][:, columns]
    old = getattr(module, matrix.parameter)
    W = (W.T if matrix.transposed else W).contiguous()
    setattr(module, matrix.parameter, nn.Parameter(W, old.requires_grad))
    bias = getattr(module, "bias", None)
    if bias is not None:
        module.bias = nn.Parameter(bias.detach()[rows].contiguous(), bias.requires_grad)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
