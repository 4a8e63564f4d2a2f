"""Calibration sequences on their way through the decoder layers, chunk by chunk, called as the model calls them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.utils._pytree import tree_any

from s3lab.errors import DataError
from s3lab.models.prune.chunks import Chunk
from s3lab.models.prune.fisher import Fisher, measure_fisher
from s3lab.models.prune.rundir import RunDir, state_folder
from s3lab.models.structure.decoder import Decoder, Matrix, Shapes, Watch, is_shape
from s3lab.shapes import Integer
from s3lab.tensors.processes import SOLO, ProcessGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STREAMS = ("dense", "pruned")
See = Callable[[Matrix, Tensor, Chunk], None]


@dataclass(frozen=True)
class Call:
    """What a decoder layer is given beside its hidden states."""

    args: tuple
    kwargs: dict[str, Any]


class Reached(Exception):
    """A forward pass has come as far as it is needed."""


@dataclass
class Flow:
    """Hidden states between decoder layers in two streams: of the dense model, and of the model as pruned so far.

    They rest on the CPU, or in the files of ``rundir``; one chunk at a time is on ``device``.  Of the ``chunks`` each
    process of a group sends its ``own`` on their way.  Where tokens are ``weighted`` by the loss, ``fisher`` has by how
    much: of the model as it is now, which must still be dense.  Raises DataError where there are fewer chunks than
    processes.
    """

    model: PreTrainedModel
    decoder: Decoder
    chunks: list[Chunk]
    device: torch.device
    rundir: RunDir | None = None
    processes: ProcessGroup = SOLO
    weighted: bool = False
    fisher: Fisher | None = field(init=False, default=None)
    _calls: dict[int, list[Call]] = field(default_factory=dict)
    _resting: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.chunks) < self.processes.size:
            raise DataError(
                f"{len(self.chunks)} chunks of sequences for {self.processes.size} processes: lower batch, "
                "or give more sequences"
            )
        for ids in (self.chunks[0].ids[:1], *(chunk.ids for chunk in self.chunks)):
            if len(ids) not in self._calls:
                self._calls[len(ids)] = trace_calls(self.model, self.decoder, ids)
        if self.weighted:
            self.fisher = measure_fisher(self.model, self.decoder, self.own, self.processes)

    @property
    def own(self) -> list[Chunk]:
        """The chunks of this process: each in turn takes one."""
        return self.chunks[self.processes.rank :: self.processes.size]

    @property
    def tokens(self) -> int:
        """How many tokens there are to calibrate on."""
        return sum(chunk.ids.numel() for chunk in self.chunks if not chunk.held_out)

    def embed(self) -> None:
        """Send all chunks as far as the first layer.

        Raises DataError if what a layer is given beside its hidden states is not the same for all of one size.
        """
        for chunk in self.own:
            hidden, call = _enter(self.model, self.decoder.layers[0], chunk.ids)
            known = self._calls[len(chunk.ids)][0]
            if not (_same(call.args, known.args) and _same(call.kwargs, known.kwargs)):
                raise DataError(
                    f"the layers of {type(self.model).__name__} are given other arguments for other tokens: such a "
                    "model cannot be pruned layer by layer"
                )
            for stream in STREAMS:
                self.put(0, stream, chunk, hidden)

    def put(self, index: int, stream: str, chunk: Chunk, hidden: Tensor) -> None:
        """Store the hidden states that layer ``index`` begins with."""
        if self.rundir is None:
            self._resting[stream, chunk.number] = hidden.cpu()
        else:
            self.rundir.save(_place(index, stream, chunk), {"hidden": hidden.cpu()})

    def get(self, index: int, stream: str, chunk: Chunk) -> Tensor:
        """Return a copy of the hidden states that layer ``index`` begins with, on the device."""
        if self.rundir is None:
            return self._resting[stream, chunk.number].to(self.device, copy=True)
        return self.rundir.load(_place(index, stream, chunk))["hidden"].to(self.device)

    def shelf(self, index: int, chunk: Chunk) -> Shelf:
        """Return the place for what layer ``index`` makes of a chunk on the way; `drop` clears it."""
        return Shelf(self, index, chunk)

    def sample(self, index: int) -> tuple[Chunk, Tensor]:
        """Return the first sequence of all, and what layer ``index`` begins with of it: the same on every process."""
        first, hidden = self.chunks[0], self.get(index, "pruned", self.own[0])
        return Chunk(first.number, first.ids[:1], first.held_out), self.processes.first(hidden[:1].contiguous())

    def run(self, index: int, chunk: Chunk, hidden: Tensor) -> Tensor:
        """Return what layer ``index``, which is on the device, makes of a chunk's hidden states."""
        call = self._calls[len(chunk.ids)][index]
        args, kwargs = _move(call.args, self.device), _move(call.kwargs, self.device)
        return _first(self.decoder.layers[index](hidden, *args, **kwargs))

    def watch(
        self,
        index: int,
        stream: str,
        matrices: Mapping[str, Matrix],
        see: See,
        calls: int | None = None,
    ) -> None:
        """Tell ``see(matrix, input, chunk)`` of every product of a stream with the matrices of layer ``index``.

        A forward pass ends after ``calls`` such products, where that is given.
        """
        for chunk in self.own:
            with Watch(matrices, _count(see, chunk, calls)), suppress(Reached):
                self.run(index, chunk, self.get(index, stream, chunk))

    def advance_dense(
        self,
        index: int,
        matrices: Mapping[str, Matrix] | None = None,
        see: See | None = None,
    ) -> None:
        """Send the dense stream through layer ``index``, which must still be dense; ``see`` is as in `watch`."""
        for chunk in self.own:
            with Watch(matrices or {}, _count(see, chunk)) if see else nullcontext():
                self.put(index + 1, "dense", chunk, self.run(index, chunk, self.get(index, "dense", chunk)))

    def drop(self, index: int) -> None:
        """Remove the hidden states that layer ``index`` began with from the disk."""
        if self.rundir is not None:
            self.rundir.drop(index)

    def advance_pruned(self, index: int, leave: Callable[[Chunk], Tensor] | None = None) -> dict[str, float | None]:
        """Send the pruned stream through a layer that the dense one has passed, and return how far they are apart.

        ‖pruned − dense‖_F / ‖dense‖_F of the layer's output, over the calibration and the held-out chunks.  ``leave``
        gives what the layer makes of a chunk, if something of that is there already.
        """
        squares = torch.zeros(2, 2, dtype=torch.float64)  # apart and in all, of either kind of chunk
        for chunk in self.own:
            hidden = leave(chunk) if leave else self.run(index, chunk, self.get(index, "pruned", chunk))
            dense = self.get(index + 1, "dense", chunk)
            exact = torch.promote_types(dense.dtype, torch.float32)
            dense = dense.to(exact)
            sums = [vector_norm(x).double().square() for x in (hidden.to(exact) - dense, dense)]
            squares[int(chunk.held_out)] += torch.stack(sums).cpu()
            self.put(index + 1, "pruned", chunk, hidden)
        found = self.processes.sum(squares).tolist()
        train, test = (sqrt(apart / size) if size else None for apart, size in found)
        return {"output_error": train, "output_error_test": test}


@dataclass(frozen=True)
class Shelf:
    """Tensors of one chunk by name, in memory, or in files of the run directory: as a dict, as far as it goes."""

    flow: Flow
    index: int
    chunk: Chunk

    def __setitem__(self, name: str, x: Tensor) -> None:
        if self.flow.rundir is None:
            self.flow._resting[name, self.chunk.number] = x.cpu()
        else:
            self.flow.rundir.save(_place(self.index, name, self.chunk), {"hidden": x.cpu()}, sealed=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.flow.get(self.index, name, self.chunk)

    def __delitem__(self, name: str) -> None:
        if self.flow.rundir is None:
            del self.flow._resting[name, self.chunk.number]
        else:
            (self.flow.rundir.path / _place(self.index, name, self.chunk)).unlink()


def _count(see: See, chunk: Chunk, calls: int | None = None) -> Callable[[Matrix, Tensor, Tensor], None]:
    """A function that hands on what a Watch tells and ends the forward pass at the last of ``calls``."""
    met = 0

    def tell(matrix: Matrix, x: Tensor, out: Tensor) -> None:
        nonlocal met
        met += 1
        see(matrix, x, chunk)
        if met == calls:
            raise Reached

    return tell


def trace_calls(model: nn.Module, decoder: Decoder, ids: Integer[Tensor, "N L"]) -> list[Call]:
    """Return how a forward pass over ``ids`` calls each decoder layer.

    The products in the layers are left out, where the model allows that: what it gives each of them hangs on none.
    Raises DataError unless each layer is called once, in order, with the output of the one before as first argument.
    """
    matrices = {name: matrix for found in decoder.matrices for name, matrix in found.items()}
    with suppress(RuntimeError, NotImplementedError):
        with Shapes(matrices, lambda matrix, x, multiply: multiply(x.to("meta"))):
            calls = _trace_calls(model, decoder, ids)
        if not any(tree_any(is_shape, (call.args, call.kwargs)) for call in calls):
            return calls
    return _trace_calls(model, decoder, ids)


def _trace_calls(model: nn.Module, decoder: Decoder, ids: Tensor) -> list[Call]:
    calls: list[Call] = []
    last: list[Tensor] = []

    def enter(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        in_turn = len(calls) < len(decoder.layers) and layer is decoder.layers[len(calls)]
        if not in_turn or not args or (last and args[0] is not last[0]):
            raise DataError(
                f"the layers {decoder.name} of {type(model).__name__} are not called one after the other on the hidden "
                "states: such a model cannot be pruned layer by layer"
            )
        calls.append(Call(args[1:], dict(kwargs)))

    def leave(layer: nn.Module, args: tuple, out: Any) -> None:
        last[:] = [_first(out)]
        if len(calls) == len(decoder.layers):
            raise Reached  # before a whole batch of logits is made

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in decoder.layers]
    hooks += [layer.register_forward_hook(leave) for layer in decoder.layers]
    try:
        with suppress(Reached):
            model(input_ids=ids.to(_device(model)), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != len(decoder.layers):
        raise DataError(f"a forward pass calls {len(calls)} of the {len(decoder.layers)} layers {decoder.name}")
    return calls


def _enter(model: nn.Module, first: nn.Module, ids: Tensor) -> tuple[Tensor, Call]:
    """The hidden states and the other arguments that the first layer is called with."""
    found: list[tuple[Tensor, Call]] = []

    def stop(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append((args[0], Call(args[1:], dict(kwargs))))
        raise Reached

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=ids.to(_device(model)), use_cache=False)
    except Reached:
        return found[0]
    finally:
        hook.remove()
    raise DataError("a forward pass does not come to the first decoder layer")


def _place(index: int, stream: str, chunk: Chunk) -> str:
    return f"{state_folder(index)}/{stream}-{chunk.number:05}.safetensors"


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _move(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, tuple | list):
        return type(tree)(_move(branch, device) for branch in tree)
    return {key: _move(value, device) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other or bool(one == other)
