"""Equalisation before pruning: what makes an input large moves into the weights that read it, the model unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s3lab.errors import DataError, SpecError
from s3lab.models.basis.bench import Absorber, Bench, find_absorbers, restored
from s3lab.models.prune.chunks import Chunk, cut_chunks
from s3lab.models.prune.flow import Flow
from s3lab.models.structure.capture import evaluating
from s3lab.models.structure.decoder import Decoder, Matrix, find_decoder
from s3lab.shapes import Float, Integer
from s3lab.wildcards import matches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNKNOWN = -1
_PROBE = 128  # tokens: enough for a channel behind a ReLU to show itself


def equalise(
    model: PreTrainedModel, ids: Integer[Tensor, "N L"], only: str | Sequence[str] | None = None, *, batch: int = 8
) -> list[dict[str, Any]]:
    """Scale the inputs of a model's matrices until they and their weights are equally large, in place.

        W_ij ← W_ij s_j,   X_j ← X_j / s_j,   s_j = √(max |X_j| / max_i |W_ij|)

    max |X_j| is over the tokens of ``ids``, ``batch`` sequences at a time, max |W_j| over all matrices that read the
    input.  1 / s_j goes into what makes the input, if something does so channel by channel: a norm, the linear layer
    before a gate or a ReLU, the values before attention; what makes several channels at once, as a value does for all
    heads that share it, gets one s for them, of their largest.  What that is no name tells: it is found by doubling
    parts of it, and kept only if the layer then gives what it gave.  A channel that is always zero keeps s = 1.

    ``only`` are globs over the names of matrices, those that share an input with one that matches come along; by
    default all that can be, are.  Returns a row for each input: ``layer``, the ``matrices`` that read it, what it went
    ``into``, the least and largest s, and a ``note`` on why there was none.  The model is as exact as its dtype.

    Raises DataError for an input that ``only`` asks for and nothing can absorb, with the model as it was up to there,
    and for a model that is not a chain of layers; SpecError for a glob that matches nothing.
    Cost: a forward pass over ``ids``, and for each layer some hundred over one of its sequences.

    Source: arXiv 2507.03052; the exponent ½ on both maxima, in the manner of SmoothQuant (Xiao et al., 2023,
    equation 4), is our reading.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    >>> model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1))
    >>> [row["into"] for row in equalise(model, torch.arange(64).view(4, 16))]
    ['input_layernorm', 'self_attn.v_proj', 'post_attention_layernorm', 'mlp.up_proj']
    """
    decoder = find_decoder(model)
    globs = [only] if isinstance(only, str) else list(only or ())
    asked = _choose(decoder, globs)
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), evaluating(model):
        flow = Flow(model, decoder, cut_chunks(ids, 0.0, batch, seed=0), model.device)
        probe = Flow(model, decoder, cut_chunks(ids[:1, :_PROBE], 0.0, 1, seed=0), model.device)
        for part in (flow, probe):
            part.embed()
        for index in range(len(decoder.layers)):
            search = _Balance(Bench(probe, index))
            inputs = search.bench.inputs
            peaks = _find_peaks(flow, index, [group[0] for group in inputs])
            for group, peak in zip(inputs, peaks, strict=True):
                names = [matrix.name.removeprefix(f"{decoder.name}.{index}.") for matrix in group]
                if globs and not asked & {matrix.name for matrix in group}:
                    continue
                told = search.equalise(group, peak)
                if globs and told["note"]:
                    raise DataError(f"{group[0].name} cannot be equalised: {told['note']}; leave it out of only={only}")
                rows.append({"layer": index, "matrices": ", ".join(names), **told})
            for part in (flow, probe):
                part.advance_dense(index)
    return rows


class _Balance:
    """The search, in one layer, for what can absorb the scale of an input."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.absorbers = bench, find_absorbers(bench.layer, bench.matrices)

    def equalise(self, group: Sequence[Matrix], peak: Tensor | None) -> dict[str, Any]:
        """Equalise the input that a group of matrices shares, and tell how, or why not."""
        nothing = {"into": None, "least": 1.0, "largest": 1.0}
        if peak is None or any(matrix.expert is not None for matrix in group):
            return {**nothing, "note": "an expert's input is made of chosen tokens, not by a part of its own"}
        before = self.bench.read(group[0])
        note = "nothing in the layer makes its input channel by channel"
        for absorber in self.absorbers:
            owner = self._read_owner(group[0], before, absorber)
            if owner is None:
                continue
            scale = _balance(group, peak, owner, len(absorber.weight))
            if self._fold(group, absorber, owner, scale):
                least, largest = float(scale.min()), float(scale.max())
                return {"into": absorber.name, "least": least, "largest": largest, "note": ""}
            note = f"what {absorber.name} makes is read by more than these matrices"
        return {**nothing, "note": note}

    def _read_owner(self, matrix: Matrix, before: Tensor, absorber: Absorber) -> Tensor | None:
        """Which output of an absorber each input of a matrix is a multiple of, (K,), None if any is of another kind.

        The outputs are numbered from 1, and doubled by the bits of their number, so that every one is doubled once.
        """
        alive = before.ne(0).any(0)
        if not alive.any() or matrix.weight.shape[1] % len(absorber.weight):
            return None
        numbers = torch.arange(1, len(absorber.weight) + 1, device=before.device)
        owner = torch.zeros_like(alive, dtype=torch.long)
        for bit in range(len(numbers).bit_length()):
            with restored(absorber):
                absorber.scale(1.0 + (numbers >> bit & 1))
                after = self.bench.read(matrix)
            doubled, same = (self.bench.close(after, factor * before) for factor in (2, 1))
            if not (doubled | same)[alive].all():
                return None
            owner += (doubled & alive).long() << bit
        return owner.where(owner <= len(numbers), 0) - 1 if owner[alive].all() else None

    def _fold(self, group: Sequence[Matrix], absorber: Absorber, owner: Tensor, scale: Tensor) -> bool:
        """Move the scale of each output into the weights that read it; undone, and False, if the layer then differs."""
        before = self.bench.run()
        columns = torch.where(owner == _UNKNOWN, 1.0, scale[owner])
        with restored(absorber, *group) as keep:
            absorber.scale(1 / scale)
            for matrix in group:
                matrix.weight.copy_(matrix.weight.double() * columns)
            if same := self.bench.gives(before):
                keep.clear()
        return same


def _choose(decoder: Decoder, globs: Sequence[str]) -> set[str]:
    """The names of the matrices that globs match, whole or without what precedes the list of layers."""
    root = decoder.name.rpartition(".")[0] + "."
    names = [name for matrices in decoder.matrices for name in matrices]
    found = {glob: {name for name in names if matches(name, glob, root)} for glob in globs}
    if unused := [glob for glob in globs if not found[glob]]:
        raise SpecError(f"{', '.join(map(repr, unused))} matches no matrix: the names are like {names[0]!r}")
    return set().union(*found.values())


def _find_peaks(flow: Flow, index: int, readers: Sequence[Matrix]) -> list[Tensor | None]:
    """The largest size of each channel of what each matrix reads, None where no token came to it."""
    peaks: dict[str, Tensor] = {}

    def see(matrix: Matrix, x: Tensor, chunk: Chunk) -> None:
        if x.numel():
            peak = x.abs().flatten(0, -2).amax(0)
            peaks[matrix.name] = torch.maximum(peaks.get(matrix.name, peak), peak)

    flow.watch(index, "dense", {matrix.name: matrix for matrix in readers}, see)
    return [peaks.get(matrix.name) for matrix in readers]


def _balance(group: Sequence[Matrix], peak: Tensor, owner: Tensor, outputs: int) -> Float[Tensor, " R"]:
    """The scale of each output of an absorber, float64: 1 where the channels it makes, or their weights, are zero."""
    weight = torch.stack([matrix.weight.abs().amax(0) for matrix in group]).amax(0)
    known = owner != _UNKNOWN
    largest = [
        torch.zeros(outputs, dtype=torch.float64, device=peak.device).scatter_reduce_(
            0, owner[known], values[known].double(), "amax"
        )
        for values in (peak, weight)
    ]
    ratio = largest[0] / largest[1]
    return torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0).sqrt()
