"""Single layers to compare solvers on: of a language model, from a file, or from a seeded generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s3lab.errors import DataError
from s3lab.models.structure.capture import capture_moments, find_linears
from s3lab.shapes import Float, Integer
from s3lab.tensors.hessian import Moment, hessian

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight (M, K) with the second moments of its inputs on calibration tokens and on held-out ones."""

    name: str
    W: Float[Tensor, "M K"]
    H: Float[Tensor, "K K"]
    H_test: Float[Tensor, "K K"]
    tokens: int


def layers_of_model(
    model: PreTrainedModel,
    calibration: Integer[Tensor, "N L"],
    test: Integer[Tensor, "n L"],
    patterns: str | Sequence[str],
) -> Iterator[Layer]:
    """Yield the linear layers that match the globs, with moments over calibration and test sequences."""
    moments = capture_moments(model, calibration, patterns)
    held_out = capture_moments(model, test, patterns)
    for name, linear in find_linears(model, patterns).items():
        yield Layer(name, linear.weight.detach(), moments[name].value(), held_out[name].value(), moments[name].tokens)


def layer_from_file(
    path: str | Path, weight: str = "W", inputs: str = "X", held_out: float = 0.1, device: str = "cpu"
) -> Layer:
    """Return the layer in a .safetensors file that holds W (M, K) and X (T, K); the last tokens are held out.

    Raises DataError for a file that is missing, no safetensors, or without those tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt", device=device) as file:
            missing = {weight, inputs} - set(file.keys())
            if missing:
                raise DataError(
                    f"{path} holds {sorted(file.keys())} and not {sorted(missing)}: name the tensors to read"
                )
            W, X = file.get_tensor(weight), file.get_tensor(inputs)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as safetensors: {error}") from error
    if not 0 < held_out < 1 or not int(len(X) * held_out) > 0:
        raise DataError(
            f"held_out = {held_out} of the {len(X)} tokens of {path} leaves one part empty: give a share between"
        )
    cut = len(X) - int(len(X) * held_out)
    return Layer(Path(path).stem, W, hessian(X[:cut]), hessian(X[cut:]), cut)


def generate_layer(
    M: int,
    K: int,
    tokens: int,
    *,
    decay: float = 1.0,
    outliers: float = 0.01,
    held_out: float = 0.1,
    seed: int = 0,
    device: str = "cpu",
) -> Layer:
    """Return a random layer whose inputs are as skewed as a language model's.

    Inputs are x = s ⊙ Q Λ^½ z with z normal, Q a random rotation, Λ_j ∝ j^-decay, and s = 10 on a share ``outliers``
    of the channels, 1 elsewhere; the weight is normal of variance 1/K.  ``held_out`` is a further share of tokens.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    W = draw(M, K) / K**0.5
    spectrum = torch.arange(1, K + 1, device=device, dtype=torch.float32) ** (-decay / 2)
    scale = torch.ones(K, device=device)
    scale[torch.randperm(K, generator=generator, device=device)[: round(outliers * K)]] = 10
    mix = torch.linalg.qr(draw(K, K))[0] * (spectrum / spectrum.square().mean().sqrt())

    def moment(count: int) -> Tensor:
        total = Moment()
        for start in range(0, count, 8192):
            total.add(draw(min(8192, count - start), K) @ mix.T * scale)
        return total.value()

    return Layer(
        f"generated-{M}x{K}-decay{decay:g}",
        W,
        moment(tokens),
        moment(max(1, round(held_out * tokens))),
        tokens,
    )
