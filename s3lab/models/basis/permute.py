"""Permutation of channels before pruning: inputs change places so that a pattern keeps more, the model unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from s3lab.algebra.compose import Bound
from s3lab.errors import DataError, SpecError
from s3lab.models.basis.bench import Bench
from s3lab.models.basis.channels import Channels, find_channels
from s3lab.models.basis.order import Side, find_order, is_alike
from s3lab.models.prune.chunks import Chunk, cut_chunks
from s3lab.models.prune.flow import Flow
from s3lab.models.prune.jobs import Job, Specs, choose_jobs, read_tables
from s3lab.models.prune.sequential import as_evaluated
from s3lab.models.structure.decoder import Matrix, find_decoder
from s3lab.models.structure.structures import head_sizes
from s3lab.shapes import Float, Integer
from s3lab.solvers.base import ALONE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

By = Literal["magnitude", "wanda", "saliency"]
# What a weight W (M, K) counts, with the mean squares h (K,) of its inputs, the diagonal of H.
SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "magnitude": lambda W, h: W.abs(),
    "wanda": lambda W, h: W.abs() * h.sqrt(),
    "saliency": lambda W, h: W.square() * h,
}
_PROBE = 128  # tokens: enough for a channel behind a ReLU to show itself


def permute(
    model: PreTrainedModel,
    spec: Specs,
    by: By = "magnitude",
    calibration: Integer[Tensor, "N L"] | None = None,
    *,
    sweeps: int = 10,
    batch: int = 8,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Permute the channels of a model so that ``spec`` keeps more of its weights, in place, and return a row per input.

        max over permutations π of  Σ S_ij · mask_ij,    S = |W|,  |W_ij| √h_j  or  W_ij² h_j,    h_j = mean X_j²

    by "magnitude", "wanda" or "saliency"; h is of the dense model on sequences ``calibration`` (N, L), ``batch`` at a
    time, which magnitude does not need.  Channels are those between a matrix and what makes its inputs, in one layer:
    the inputs of an MLP's last matrix and the rows before it, and those of the output projection and the values, within
    each head, the same for all heads that share values.  All matrices that a channel runs through count, each under its
    own spec, and are permuted alike, with their biases: the model stays an ordinary one, and gives what it gave.
    Inputs that a norm makes stay, as all layers share that order.

    ``spec`` is as in `prune_model`; matrices of a coupled spec and dense ones have no say.  `find_order` tells how
    orders are sought, ``sweeps`` times at most; none keeps less than before.  Rows: ``layer``; the ``matrices`` that
    read the input and the ``producers`` of it; the shares of the sum of S that are kept ``before`` and ``after``; and
    a ``note`` where nothing moved.  The model is as exact as its dtype, and its mode stays.

    Raises DataError for a score without calibration and for a model that is not a chain of layers, SpecError for a spec
    that does not fit.  Cost: a forward pass over the sequences, for each input some tens of passes of its layer over
    128 tokens, and the search.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    >>> model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1))
    >>> rows = permute(model, "2:4", "wanda", torch.arange(64).view(4, 16))
    >>> [(row["matrices"], row["producers"]) for row in rows if not row["note"]]
    [('self_attn.o_proj', 'self_attn.v_proj'), ('mlp.down_proj', 'mlp.gate_proj, mlp.up_proj')]
    >>> all(row["after"] > row["before"] for row in rows if not row["note"])
    True
    """
    if by not in SCORES:
        raise DataError(f"by = {by!r}: channels are permuted by {', '.join(SCORES)}")
    if calibration is None and by != "magnitude":
        raise DataError(f"{by} weighs inputs by their size: give sequences of tokens (N, L) as calibration")
    decoder = find_decoder(model)
    jobs = choose_jobs(decoder, model.config, read_tables(spec))
    ids = _draw(model, seed) if calibration is None else calibration
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), as_evaluated(model, decoder):
        probe = Flow(model, decoder, cut_chunks(ids[:1, :_PROBE], 0.0, 1, seed), model.device)
        flow = probe if by == "magnitude" else Flow(model, decoder, cut_chunks(ids, 0.0, batch, seed), model.device)
        flows = (probe,) if flow is probe else (probe, flow)
        for part in flows:
            part.embed()
        for index in range(len(decoder.layers)):
            layer = _Layer(Bench(probe, index), by, _bind(jobs[index]), _measure(flow, index))
            for group in layer.bench.inputs:
                told = layer.permute(group, _find_head(model), sweeps, seed)
                rows.append({"layer": index, "matrices": layer.names(group), **told})
            for part in flows:
                part.advance_dense(index)
    return rows


class _Layer:
    """One layer whose channels are permuted, with the patterns of its matrices and the mean squares of their inputs."""

    def __init__(self, bench: Bench, by: By, patterns: dict[str, Bound], squares: dict[str, Tensor]) -> None:
        self.bench, self.by, self.patterns, self.squares = bench, by, patterns, squares

    def permute(self, group: Sequence[Matrix], head: int | None, sweeps: int, seed: int) -> dict[str, Any]:
        """Permute the channels of an input, and tell how, or why not."""
        told: dict[str, Any] = {"producers": "", "before": None, "after": None, "note": ""}
        try:
            channels = find_channels(self.bench, group, head)
        except DataError as error:
            return {**told, "note": str(error)}
        told["producers"] = self.names(channels.producers)
        sides = [self._see(matrix, places) for matrix, places in channels.sides if matrix.name in self.patterns]
        if all(is_alike(side) for side in sides):
            return {**told, "note": "its patterns keep the same in any order of its channels"}
        order = find_order(sides, channels.heads, sweeps=sweeps, seed=seed)
        same = torch.arange(len(order), device=order.device)
        total = sum(float(side.scores.double().sum()) for side in sides)
        before, after = (sum(side.kept(o) for side in sides) / total if total else 1.0 for o in (same, order))
        self._move(channels, order)
        note = "" if after > before else "no better order was found"
        return {**told, "before": before, "after": after, "note": note}

    def names(self, matrices: Sequence[Matrix]) -> str:
        """The names of matrices inside the layer."""
        root = f"{self.bench.flow.decoder.name}.{self.bench.index}."
        return ", ".join(matrix.name.removeprefix(root) for matrix in matrices)

    def _see(self, matrix: Matrix, places: Tensor) -> Side:
        scores = SCORES[self.by](matrix.weight.float(), self._mean_squares(matrix))
        return Side(self.patterns[matrix.name], scores, places)

    def _move(self, channels: Channels, order: Tensor) -> None:
        channels.move(order)
        for matrix in channels.readers:  # which may make the channels of another input
            h = self._mean_squares(matrix).clone()
            h[channels.columns] = h[channels.columns[order]]
            self.squares[matrix.name] = h

    def _mean_squares(self, matrix: Matrix) -> Float[Tensor, " K"]:
        # what no token came to counts as if its inputs were all alike
        return self.squares.get(matrix.name, matrix.weight.new_ones(matrix.weight.shape[1], dtype=torch.float32))


def _bind(jobs: Sequence[Job]) -> dict[str, Bound]:
    """The patterns on the matrices of a layer that are pruned on their own."""
    alone = [(job.spec, job.matrices[ALONE]) for job in jobs if ALONE in job.matrices]
    return {matrix.name: spec.bind(tuple(matrix.weight.shape)) for spec, matrix in alone}


def _measure(flow: Flow, index: int) -> dict[str, Tensor]:
    """The mean squares of the inputs of each matrix of a layer that a token comes to, float32 (K,)."""
    sums: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def see(matrix: Matrix, x: Tensor, chunk: Chunk) -> None:
        if x.numel():
            x = x.flatten(0, -2)
            sums[matrix.name] = sums.get(matrix.name, 0) + x.double().square().sum(0)
            tokens[matrix.name] = tokens.get(matrix.name, 0) + len(x)

    flow.watch(index, "dense", flow.decoder.matrices[index], see)
    return {name: (total / tokens[name]).float() for name, total in sums.items()}


def _find_head(model: PreTrainedModel) -> int | None:
    try:
        return head_sizes(model.config)["head"]
    except SpecError:
        return None


def _draw(model: PreTrainedModel, seed: int) -> Integer[Tensor, "1 L"]:
    """Random tokens, to see by what the inputs hang on."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.get_text_config().vocab_size, (1, _PROBE), generator=generator)
