"""Block-wise fine-tuning: the kept weights of each decoder layer trained to give what the dense layer gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import cos, isfinite, pi, sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from s3lab.errors import DataError, SolveError
from s3lab.folder import claim
from s3lab.models.prune.chunks import Chunk, cut_chunks
from s3lab.models.prune.flow import Flow
from s3lab.models.prune.rundir import RunDir, hash_tensors, layer_file
from s3lab.models.structure.decoder import Decoder, find_decoder
from s3lab.shapes import Integer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How a layer learns: passes over the sequences, ``batch`` sequences a step, AdamW at a rate that falls to zero.

    The rate is ``lr`` and falls by a half cosine; weights do not decay.  Raises SolveError for what trains nothing.
    """

    epochs: int = 4
    batch: int = 8
    lr: float = 1e-4

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not 0 < self.lr < float("inf"):
            raise SolveError(f"{self}: epochs and batch are at least 1, lr is above 0")

    def rate(self, share: float) -> float:
        """Learning rate when a share of the steps is done."""
        return self.lr * (1 + cos(pi * share)) / 2


class Step(NamedTuple):
    """How far the training is: ``done`` of ``total`` epochs over all layers, in layer ``layer``, the loss of that."""

    done: int
    total: int
    layer: int
    layers: int
    loss: float


def finetune(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    ids: Integer[Tensor, "N L"],
    schedule: Schedule | None = None,
    *,
    held_out: float = 0.1,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool | Callable[[Step], object] = True,
) -> list[dict[str, Any]]:
    """Train the kept weights of a pruned model's decoder layers, in place, and return a row for each layer.

        min ‖f_l(x; Ŵ) − f_l(x_dense; W)‖² / numel   over the Ŵ_ij ≠ 0 of the matrices of layer l,

    layer by layer: x are the hidden states that the layers before, as trained, give of the sequences ``ids``, x_dense
    those of the ``dense`` model.  What is zero stays exactly zero; norms and biases stay as they are.  Weights of half
    precision are trained in float32 and rounded after each step.  A share ``held_out`` of the sequences is only
    measured; a layer that got worse on it, or, without one, on the others, is given its weights back.

    Rows: ``layer``; the relative output error ``before`` and ``after``, and ``test_before``, ``test_after`` on what
    is held out; and whether the training was ``kept``.  ``out`` names a run directory: the same call on the same models
    goes on after the last whole layer, on a CPU to the same bits.  ``progress`` is a bar, or a function of each Step.
    Each model is on its own device, and so are the hidden states while a layer is at work.

    Raises DataError for models that are not of one shape, too few sequences, and a run directory of other settings;
    SolveError where the loss is no number.
    Cost: 3·epochs + 4 forward passes of each layer over the sequences.

    Source: arXiv 2507.03052, block-wise fine-tuning; that the target is of the dense model's own hidden states, and
    the optimiser's options, are our reading.

    >>> from copy import deepcopy
    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> import s3lab as s3
    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    >>> dense = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    >>> model, ids = deepcopy(dense), torch.arange(256).view(16, 16) % 64
    >>> run = s3.prune_model(model, None, "2:4", "magnitude", calibration=ids, progress=False)
    >>> rows = finetune(model, dense, ids, Schedule(lr=1e-3), progress=False)
    >>> rows[0]["after"] < rows[0]["before"]
    True
    """
    schedule, decoders = schedule or Schedule(), (find_decoder(model), find_decoder(dense))
    _check_alike(*decoders)
    chunks = cut_chunks(ids, held_out, schedule.batch, seed)
    settings = {
        "finetune": {**asdict(schedule), "held_out": held_out, "seed": seed},
        "model": hash_tensors(dict(model.named_parameters())),
        "dense": hash_tensors(dict(dense.named_parameters())),
        "calibration": hash_tensors({"ids": ids}),
        "device": model.device.type,
    }
    count = len(decoders[0].layers)
    with claim(out), _frozen(model), _frozen(dense), _report(progress, count * schedule.epochs) as report:
        rundir = None if out is None else RunDir(out, settings)
        flow, target = (Flow(m, d, chunks, m.device) for m, d in zip((model, dense), decoders, strict=True))
        for part in (flow, target):
            part.embed()
        rows: list[dict[str, Any]] = []
        for index in range(count):
            target.advance_dense(index)
            lesson = _Lesson(flow, target, index)
            if rundir and index < len(rundir.layers):
                _restore(rundir, decoders[0], index)
                rows.append(rundir.layers[index]["row"])
            else:

                def tell(epoch: int, loss: float, index: int = index) -> None:
                    report(Step(index * schedule.epochs + epoch + 1, count * schedule.epochs, index, count, loss))

                rows.append({"layer": index, **lesson.learn(schedule, seed, tell)})
                if rundir:
                    rundir.commit(_weights(decoders[0], index), {"row": rows[-1]})
            lesson.advance()
    return rows


class _Errors(NamedTuple):
    """Relative output errors of a layer on what it learns from, and on what is held out, None without that."""

    train: float
    test: float | None

    @property
    def decisive(self) -> float:
        """The one that tells whether a layer got better."""
        return self.train if self.test is None else self.test


class _Lesson:
    """One layer, what it is given, and what it should make of that."""

    def __init__(self, flow: Flow, target: Flow, index: int) -> None:
        self.flow, self.target, self.index = flow, target, index
        matrices = flow.decoder.matrices[index].values()
        parameters = {(id(m.module), m.parameter): getattr(m.module, m.parameter) for m in matrices}
        self.parameters: list[nn.Parameter] = list(parameters.values())
        self.masks = [p != 0 for p in self.parameters]

    def learn(self, schedule: Schedule, seed: int, tell: Callable[[int, float], None]) -> dict[str, Any]:
        """Train the layer, and return its errors before and after."""
        before, kept = self.measure(), [p.detach().clone() for p in self.parameters]
        masters = [p.detach().float() for p in self.parameters]
        optimizer = torch.optim.AdamW(masters, lr=schedule.lr, weight_decay=0.0)
        chunks = [chunk for chunk in self.flow.chunks if not chunk.held_out]
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(schedule.epochs):
            total = 0.0
            for step, place in enumerate(torch.randperm(len(chunks), generator=generator).tolist()):
                share = (epoch + step / len(chunks)) / schedule.epochs
                optimizer.param_groups[0]["lr"] = schedule.rate(share)
                total += self._step(optimizer, masters, chunks[place])
            if not isfinite(total):
                raise SolveError(f"layer {self.index}: the loss is {total} in epoch {epoch}: lower lr={schedule.lr:g}")
            tell(epoch, total / len(chunks))
        after = self.measure()
        better = after.decisive <= before.decisive
        if not better:
            self._write(kept)
        tests = {"test_before": before.test, "test_after": after.test}
        return {"before": before.train, "after": after.train, **tests, "kept": better}

    def measure(self) -> _Errors:
        """‖layer − dense‖ / ‖dense‖ of the output, over the sequences to train on and over those held out."""
        squares = torch.zeros(2, 2, dtype=torch.float64)
        with torch.no_grad():
            for chunk in self.flow.chunks:
                hidden, dense = self._run(chunk).double(), self._goal(chunk).double()
                squares[int(chunk.held_out)] += torch.stack(
                    [(hidden - dense).square().sum(), dense.square().sum()]
                ).cpu()
        train, test = (sqrt(apart / size) if size else None for apart, size in squares.tolist())
        return _Errors(train or 0.0, test)

    def advance(self) -> None:
        """Send the sequences through the layer as it is now."""
        with torch.no_grad():
            for chunk in self.flow.chunks:
                self.flow.put(self.index + 1, "pruned", chunk, self._run(chunk))

    def _step(self, optimizer: torch.optim.Optimizer, masters: list[Tensor], chunk: Chunk) -> float:
        with torch.enable_grad(), _learning(self.parameters):
            loss = nn.functional.mse_loss(self._run(chunk).float(), self._goal(chunk).float())
            loss.backward()
        for master, p, mask in zip(masters, self.parameters, self.masks, strict=True):
            # an expert that saw no token has no gradient
            master.grad = torch.zeros_like(master) if p.grad is None else p.grad.float() * mask
            p.grad = None
        optimizer.step()
        self._write(masters)
        return loss.item()

    def _write(self, tensors: list[Tensor]) -> None:
        for p, tensor in zip(self.parameters, tensors, strict=True):
            p.data.copy_(tensor)

    def _run(self, chunk: Chunk) -> Tensor:
        return self.flow.run(self.index, chunk, self.flow.get(self.index, "pruned", chunk))

    def _goal(self, chunk: Chunk) -> Tensor:
        return self.target.get(self.index + 1, "dense", chunk).to(self.flow.device)


def _check_alike(one: Decoder, other: Decoder) -> None:
    shapes = [[(name, m.weight.shape) for matrices in d.matrices for name, m in matrices.items()] for d in (one, other)]
    if shapes[0] != shapes[1]:
        raise DataError("the pruned and the dense model are not of one shape: give the model before it was pruned")
    if any(a.weight.data_ptr() == b.weight.data_ptr() for a, b in zip(_all(one), _all(other), strict=True)):
        raise DataError("the pruned and the dense model share their weights: give a deep copy from before the pruning")


def _all(decoder: Decoder) -> list[Any]:
    return [matrix for matrices in decoder.matrices for matrix in matrices.values()]


def _weights(decoder: Decoder, index: int) -> dict[str, Tensor]:
    return {name: matrix.weight for name, matrix in decoder.matrices[index].items()}


def _restore(rundir: RunDir, decoder: Decoder, index: int) -> None:
    for name, W in rundir.load(layer_file(index)).items():
        decoder.matrices[index][name].weight.copy_(W)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Have a model in evaluation mode, and no gradient for any of its parameters."""
    training, asked = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        for p, before in asked:
            p.requires_grad_(before)


@contextmanager
def _learning(parameters: list[nn.Parameter]) -> Iterator[None]:
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(False)


@contextmanager
def _report(progress: bool | Callable[[Step], object], total: int) -> Iterator[Callable[[Step], object]]:
    """Yield what hears of each step: the function given, a bar, or nothing."""
    if progress is False:
        yield lambda step: None
    elif callable(progress):
        yield progress
    else:
        from tqdm.auto import tqdm

        with tqdm(total=total, unit="epoch") as bar:

            def show(step: Step) -> None:
                bar.set_postfix_str(f"layer {step.layer + 1}/{step.layers}, loss {step.loss:.3g}", refresh=False)
                bar.update(step.done - bar.n)

            yield show
