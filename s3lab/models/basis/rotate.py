"""Rotation before pruning: the residual stream and the values of heads in another basis, the model unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from s3lab.errors import DataError, SolveError
from s3lab.models.basis.bench import Absorber, Bench, restored, rows_of
from s3lab.models.basis.channels import Channels, find_channels
from s3lab.models.basis.orthogonal import Reads, Terms, Writes, hadamard, learn
from s3lab.models.basis.residual import Reading, Residual, find_all_matrices, find_norms, find_residual
from s3lab.models.prune.chunks import cut_chunks
from s3lab.models.prune.flow import Flow
from s3lab.models.prune.sequential import as_evaluated
from s3lab.models.structure.decoder import Decoder, Matrix, find_decoder
from s3lab.models.structure.structures import head_sizes
from s3lab.shapes import Float, Integer
from s3lab.tensors.hessian import Moment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["hadamard", "learned"]
KINDS = ("hadamard", "learned")
_PROBE = 128  # tokens to see by what reads what


@dataclass(frozen=True)
class Rotation:
    """What `rotate` did: the ``width`` of the stream, of how many ``layers`` the ``heads`` were rotated, too.

    ``untied`` says that the head had the weights of the embedding and has its own since; the entropies of importance,
    in nats, are those of the residual stream, None where nothing was learned.
    """

    kind: str
    width: int
    layers: int
    heads: int
    untied: bool
    entropy_before: float | None = None
    entropy_after: float | None = None


def rotate(
    model: PreTrainedModel,
    kind: Kind = "hadamard",
    calibration: Integer[Tensor, "N L"] | None = None,
    *,
    steps: int = 200,
    batch: int = 8,
    seed: int = 0,
) -> Rotation:
    """Rotate the residual stream of a model, and the values of its heads, in place, and return what was done.

        x ← x Q:    embedding E Q,  what reads W diag(γ) Q,  what writes Qᵀ W,  its bias b Q,    γ ← 1

    with γ the weight of the RMS norm before, which then is the same for x and for x Q, and by a matrix R for each head
    of values: what makes them Rᵀ W_v, what reads them W_o R.  ``kind`` "hadamard" takes Q and R that spread importance
    evenly, with ``seed``; "learned" those that gather it, as `learn` says, in ``steps`` steps on second moments of the
    sequences ``calibration`` (N, L), ``batch`` at a time.  The model stays an ordinary one and gives what it gave; a
    head whose weights are the embedding's gets weights of its own, as γ goes into one of the two alone.

    What reads and writes the stream is found by changing norms, not by name.  Values that cannot be rotated stay.

    Raises DataError for a model with a norm that is no RMS norm, one that gives other logits afterwards, which then is
    as it was, and for learning without calibration; SolveError for less than a step.  Cost: products of all
    weights with Q, a copy of the model for the time, and for learning a forward pass and the steps.

    Source: Ashkboos et al., *SliceGPT*, arXiv 2401.15024, and *QuaRot*, arXiv 2404.00456, for the rotation, of which
    only that part is made which needs no work at run time; Gu et al., *DenoiseRotator*, arXiv 2505.23049, for the
    entropy.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    >>> model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1))
    >>> rotate(model)
    Rotation(kind='hadamard', width=16, layers=1, heads=1, untied=False, entropy_before=None, entropy_after=None)
    """
    if kind not in KINDS:
        raise DataError(f"kind = {kind!r}: a rotation is of kind {' or '.join(KINDS)}")
    if kind == "learned" and calibration is None:
        raise DataError("a rotation is learned on second moments: give sequences of tokens (N, L) as calibration")
    if steps < 1:
        raise SolveError(f"steps = {steps}: a rotation is learned in at least one")
    decoder = find_decoder(model)
    generator = torch.Generator().manual_seed(seed)
    embedding, head = _find_ends(model)
    width = embedding.weight.shape[1]
    ids = torch.randint(len(embedding.weight), (1, _PROBE), generator=generator) if calibration is None else calibration
    with torch.no_grad(), as_evaluated(model, decoder):
        last = _find_last(model, decoder, width, head)
        layers = _survey(model, decoder, ids[:1, :_PROBE], width)
        kept = [(parameter, parameter.clone()) for parameter in model.parameters()]
        before = _read_logits(model, ids[:1, :_PROBE])
        untied = head.weight is embedding.weight
        if untied:
            head.weight = nn.Parameter(head.weight.detach().clone())
        for reading in (last, *(reading for layer in layers for reading in layer.residual.readings)):
            reading.fold()
        Q, entropies = hadamard(width, seed).to(embedding.weight.device), (None, None)
        if kind == "learned" and calibration is not None:
            flow = Flow(model, decoder, cut_chunks(ids, 0.0, batch, seed), model.device)
            flow.embed()
            for index, layer in enumerate(layers):
                layer.measure(flow, index)
                flow.advance_dense(index)
            Q, *found = learn((width, width), [layer.terms for layer in layers], steps=steps, seed=seed)
            entropies = (found[0], found[1])
        probe = Flow(model, decoder, cut_chunks(ids[:1, :_PROBE], 0.0, 1, seed), model.device)
        probe.embed()
        turned = 0
        for index, layer in enumerate(layers):
            turned += layer.turn_heads(Bench(probe, index), steps, seed)
            probe.advance_dense(index)
        for matrix in (*last.readers, *(m for layer in layers for r in layer.residual.readings for m in r.readers)):
            matrix.weight.copy_(matrix.weight.double() @ Q)
        for matrix in (matrix for layer in layers for matrix in layer.residual.writers):
            turn_outputs(rows_of(matrix), Q)
        embedding.weight.copy_(embedding.weight.double() @ Q)
        after = _read_logits(model, ids[:1, :_PROBE])
        if (after - before).norm() > torch.finfo(embedding.weight.dtype).eps ** 0.5 * before.norm():
            if untied:
                head.weight = embedding.weight
            for parameter, old in kept:
                parameter.copy_(old)
            raise DataError(
                f"{type(model).__name__} gives other logits once it is rotated, and is as it was: something in it "
                "reads the residual stream in a way that was not found"
            )
        if untied:
            model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return Rotation(kind, width, len(layers), turned, untied, *entropies)


def turn_outputs(matrix: Absorber, Q: Float[Tensor, "n n"]) -> None:
    """Turn the outputs y of a matrix, with its bias, into y Q, in place."""
    matrix.weight.copy_(Q.T @ matrix.weight.double())
    if matrix.bias is not None:
        matrix.bias.copy_(matrix.bias.double() @ Q)


class _Layer:
    """What is rotated in one layer; of the ``values`` of its heads None, if those cannot be."""

    def __init__(self, residual: Residual, values: Channels | None) -> None:
        self.residual, self.values = residual, values
        self.H: dict[str, Tensor] = {}

    def measure(self, flow: Flow, index: int) -> None:
        """Take the second moments of the inputs of the layer's matrices, as they are now."""
        moments = {name: Moment() for name in flow.decoder.matrices[index]}
        flow.watch(index, "dense", flow.decoder.matrices[index], lambda matrix, x, _: moments[matrix.name].add(x))
        self.H = {name: moment.value() for name, moment in moments.items() if moment.tokens}

    @property
    def terms(self) -> Terms:
        """What the rotation of the residual stream is learned from."""
        readers = [m for reading in self.residual.readings for m in reading.readers if m.name in self.H]
        writers = [m for m in self.residual.writers if m.name in self.H]
        return [
            *(Reads(matrix.weight.float(), self.H[matrix.name]) for matrix in readers),
            *(Writes(matrix.weight.float(), self.H[matrix.name].diagonal()) for matrix in writers),
        ]

    def turn_heads(self, bench: Bench, steps: int, seed: int) -> bool:
        """Rotate the values in each head, by rotations that are learned where moments were taken; False if none is."""
        values = self.values
        if values is None:
            return False
        heads = torch.stack([(values.heads == head).nonzero()[:, 0] for head in values.heads.unique()])  # (G, n)
        size = heads.shape[1]
        R = hadamard(size, seed).to(heads.device).expand(len(heads), size, size)
        if self.H:
            R = learn((len(heads), 1, size, size), [self._weigh_heads(values, heads)], steps=steps, seed=seed)[0][:, 0]
        output = bench.run()
        with restored(*values.readers, *values.absorbers) as keep:
            for places, turn in zip(heads, R, strict=True):
                self._turn(values, places, turn)
            if same := bench.gives(output):
                keep.clear()
        return same

    def _turn(self, values: Channels, places: Tensor, R: Tensor) -> None:
        """Rotate one head: the rows that make its values, and the columns of all heads that read them."""
        for absorber, rows in zip(values.absorbers, values.rows.values(), strict=True):
            own = rows[places][:, 0]
            absorber.weight[own] = (R.T @ absorber.weight[own].double()).to(absorber.weight)
            if absorber.bias is not None:
                absorber.bias[own] = (absorber.bias[own].double() @ R).to(absorber.bias)
        for matrix in values.readers:
            for columns in values.columns[places].T:
                matrix.weight[:, columns] = (matrix.weight[:, columns].double() @ R).to(matrix.weight)

    def _weigh_heads(self, values: Channels, heads: Tensor) -> Terms:
        """What the rotations (G, 1, n, n) of the heads are learned from: weights (G, heads that share values, ·, ·)."""
        columns = values.columns[heads].mT  # (G, q, n)
        reads = [
            Reads(
                m.weight.float()[:, columns].permute(1, 2, 0, 3),
                self.H[m.name][columns.unsqueeze(-1), columns.unsqueeze(-2)],
            )
            for m in values.readers
        ]
        writes = [
            Writes(m.weight.float()[rows[heads][..., 0]].unsqueeze(1), self.H[m.name].diagonal())
            for m, rows in zip(values.producers, values.rows.values(), strict=True)
        ]
        return [*reads, *writes]


def _survey(model: PreTrainedModel, decoder: Decoder, ids: Tensor, width: int) -> list[_Layer]:
    """See how each layer is built, before anything is changed."""
    flow = Flow(model, decoder, cut_chunks(ids, 0.0, 1, seed=0), model.device)
    flow.embed()
    found = []
    for index, layer in enumerate(decoder.layers):
        bench = Bench(flow, index, find_all_matrices(layer, decoder.matrices[index], f"{decoder.name}.{index}"))
        found.append(_Layer(find_residual(bench, width), _find_values(Bench(flow, index), model)))
        flow.advance_dense(index)
    return found


def _find_values(bench: Bench, model: PreTrainedModel) -> Channels | None:
    """The channels of the values of all heads, None where there are none that can be rotated."""
    head = head_sizes(model.config)["head"]
    for group in bench.inputs:
        try:
            channels = find_channels(bench, group, head)
        except DataError:
            continue
        counts = channels.heads.unique(return_counts=True)[1]
        single = all(rows.shape[1] == 1 for rows in channels.rows.values())
        if channels.linear and single and bool((counts == counts[0]).all()):
            return channels
    return None


def _find_ends(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear):
        raise DataError(f"{type(model).__name__} has no embedding, or no linear head after its layers, to rotate")
    if embedding.weight.shape[1] != head.weight.shape[1]:
        raise DataError(
            f"{type(model).__name__} has an embedding and a head of different widths, and cannot be rotated"
        )
    return embedding, head


def _find_last(model: PreTrainedModel, decoder: Decoder, width: int, head: nn.Linear) -> Reading:
    """The norm after the last layer, which the head reads."""
    inside = {id(module) for layer in decoder.layers for module in layer.modules()}
    outside = {name: part for name, part in model.named_modules() if id(part) not in inside and not [*part.children()]}
    norms = [norm for name, part in outside.items() for norm in find_norms(part, width, name)]
    if len(norms) != 1:
        told = ", ".join(norm.name for norm in norms) or "none"
        raise DataError(f"outside the layers of {type(model).__name__} one norm is expected, and there are: {told}")
    return Reading(norms[0], (Matrix("head", head),))


def _read_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(model.device), use_cache=False).logits.double()
