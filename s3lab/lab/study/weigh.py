"""What a model weighs when it is pruned and packed, and what it takes to run: bytes, perplexity, time a token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import s3lab
from s3lab.algebra.patterns import parse
from s3lab.errors import SpecError
from s3lab.lab.run.fresh import hash_source
from s3lab.lab.study.recall import recall
from s3lab.models.prune.sequential import prune_model
from s3lab.models.prune.shrink import shrink
from s3lab.models.storage.checkpoint import save_pruned
from s3lab.models.storage.packed import pack_model
from s3lab.models.structure.decoder import find_matrices
from s3lab.models.text.pretrained import load_model, to_dtype, to_fast_dtype
from s3lab.models.text.reference import perplexity
from s3lab.packing.codec import ALONE, pack
from s3lab.packing.file import Entry, find_files, read_packed, read_tensors
from s3lab.packing.linear import BUFFERS, PackedLinear
from s3lab.packing.values import Kind
from s3lab.shapes import Integer
from s3lab.tensors.meter import Meter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENSE = "dense"
_STEPS = "prefill", "decode"
_ALL = "1:1"  # the pattern that keeps every weight: packed by it, a dense model is a quantised one


@dataclass(frozen=True, eq=False)
class Weighing:
    """What all rows share: a dense model, which stays as it is, its tokenizer, sequences, a solver, and the clock's.

    Models are timed on the first ``prompt`` tokens of the test sequences, and on ``tokens`` that they write after it,
    ``repeats`` times in turns with the dense one, in their own dtype; the rest goes by `to_fast_dtype`.
    What is finished is kept in ``folder``, if there is one, so that a run that was stopped goes on.
    """

    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Integer[Tensor, "N L"]
    test: Integer[Tensor, "n L"]
    solver: str = "sparsegpt"
    damp: float = 1e-2
    seed: int = 0
    prompt: int = 128
    tokens: int = 8
    repeats: int = 3
    folder: str | Path | None = None

    def rows(self, models: Mapping[str, Sequence[Kind]]) -> Iterator[dict[str, Any]]:
        """Yield a row for each pattern and each way to store its values, of the model saved, packed and loaded again.

        The pattern `DENSE` keeps all weights; a structure such as "mlp-channels keep 75%" leaves a smaller dense model.
        A row has what `weigh_folder`, `count_memory` and `time_models` tell, ``bytes_per_weight`` of the matrices over
        the weights of the dense model's, ``perplexity``, ``unpacked_perplexity``, that of the pruned model before it
        was packed, ``decode_tokens_per_s`` and ``prefill_tokens_per_s``, and ``decode_faster`` and ``prefill_faster``,
        how many times those of the dense model they are.  Raises what `prune_model` and `pack_model` do.
        """
        for pattern in models:
            self._check(pattern)
        with TemporaryDirectory() as home:
            folder = home if self.folder is None else self.folder
            for pattern, kinds in models.items():
                key = {**self._key, "pattern": pattern, "kinds": list(kinds)}
                yield from recall(folder, key, lambda p=pattern, k=kinds: list(self._weigh(p, k, Path(folder))))

    def _check(self, pattern: str) -> None:
        """Raise what a pattern raises on a matrix that it does not divide, before any work is done."""
        if pattern == DENSE or " keep " in pattern or (spec := parse(pattern)).names:
            return
        for name, layer in find_layers(self.dense).items():
            try:
                spec.bind((layer.weight.shape[0], layer.weight.shape[1]))
            except SpecError as error:
                raise SpecError(f"{name}: {error}") from error

    @cached_property
    def _key(self) -> dict[str, Any]:
        told = sha256()
        for tensor in (self.calibration, self.test, *self.dense.parameters()):
            told.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        home = Path(s3lab.__file__).parent
        source = [hash_source(home / floor) for floor in ("algebra", "tensors", "solvers", "packing")]
        plain = {key: value for key, value in vars(self).items() if isinstance(value, str | float | int)}
        plain.pop("folder", None)
        return {**plain, "data": told.hexdigest(), "device": str(self.dense.device), "source": source}

    def _weigh(self, pattern: str, kinds: Sequence[Kind], folder: Path) -> Iterator[dict[str, Any]]:
        weights = sum(matrix.weight.numel() for matrix in find_layers(self.dense).values())
        with TemporaryDirectory() as own:
            pruned = Path(own) / "pruned"
            facts = self._prune(pattern, pruned, folder / f"moments-{self._key['data'][:12]}-{self.seed}")
            for kind in kinds:
                packed = pruned
                if pattern != DENSE or kind != "same":
                    packed = Path(own) / f"packed-{kind}"
                    pack_model(pruned, packed, values=kind)
                row = {"pattern": pattern, "values": kind, "solver": self.solver, **facts}
                yield row | self._measure(packed, weights)

    def _prune(self, pattern: str, out: Path, moments: Path) -> dict[str, Any]:
        """Save the pruned model in the dtype of the dense one, and return its density and perplexity."""
        model = deepcopy(self.dense)
        stored = to_fast_dtype(model, model.device)
        run = prune_model(
            model,
            None,
            _ALL if pattern == DENSE else pattern,
            self.solver,
            calibration=self.calibration,
            damp=self.damp,
            hessians="dense",
            moments=moments,
            seed=self.seed,
            progress=False,
        )
        to_dtype(model, stored)
        save_pruned(model, self.tokenizer, out, run, shrink(model) if " keep " in pattern else None)
        return {"density": run.density, "unpacked_perplexity": self._perplexity(model)}

    def _measure(self, folder: Path, weights: int) -> dict[str, Any]:
        model, _ = load_model(folder, device=self.dense.device)
        found = weigh_folder(folder, find_layers(model))
        ids = self.test[:1, : self.prompt].to(self.dense.device)
        own, dense = time_models([model, self.dense], ids, self.tokens, self.repeats)
        memory = count_memory(model)  # after they ran: packed layers are laid out by then
        return {
            **found,
            "bytes_per_weight": found["matrix_bytes"] / weights,
            "memory_bytes": memory,
            "perplexity": self._perplexity(model),
            **own,
            **{f"{step}_tokens_per_s": 1e3 / own[f"{step}_ms"] for step in _STEPS},
            **{f"{step}_faster": dense[f"{step}_ms"] / own[f"{step}_ms"] for step in _STEPS},
        }

    def _perplexity(self, model: PreTrainedModel) -> float:
        """The perplexity of the stored weights, by products in the dtype that this device is fast in."""
        to_fast_dtype(model, self.dense.device)
        return perplexity(model, self.test)


def find_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Return the linear layers of a model by name, packed or not, without the output embedding."""
    head = model.get_output_embeddings()
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    dense = {name: matrix.module for name, matrix in find_matrices(model).items() if matrix.parameter == "weight"}
    return {name: module for name, module in (dense | packed).items() if module is not head}


def weigh_folder(folder: Path, layers: Mapping[str, object]) -> dict[str, Any]:
    """Return what a saved model takes on disk, in bytes: its files, the matrices of these layers, and the rest.

    ``counted_bytes`` are those of the matrices as the algebra counts them, where they are packed, and as they are.
    """
    files = find_files(folder)
    tensors, metadata = read_tensors(files)
    own = {f"{name}.{part}" for name in layers for part in ("weight", *BUFFERS)} & tensors.keys()
    entries, dense = read_packed(folder) if "s3lab" in metadata else ([], tensors)
    counted = sum(entry.packed.theory_bits * entry.packed.weights / 8 for entry in entries)
    return {
        "file_bytes": sum(path.stat().st_size for path in files),
        "matrix_bytes": sum(tensors[name].nbytes for name in own),
        "counted_bytes": counted + sum(dense[name].nbytes for name in own & dense.keys()),
        "rest_bytes": sum(tensor.nbytes for name, tensor in tensors.items() if name not in own),
    }


def count_memory(model: nn.Module) -> int:
    """Return the bytes of all tensors that a model holds, each storage once, with what packed layers lay out to run.

    >>> count_memory(nn.Linear(4, 4, bias=False))
    64
    """
    packed = [module.laid_out for module in model.modules() if isinstance(module, PackedLinear)]
    held = [*model.parameters(), *model.buffers(), *_find_tensors(packed)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())


def time_models(
    models: Sequence[PreTrainedModel], ids: Integer[Tensor, "1 L"], tokens: int, repeats: int
) -> list[dict[str, float]]:
    """Return for each model ``prefill_ms`` and ``decode_ms``, milliseconds a token that it reads and that it writes.

    It reads ``ids`` at once, and writes ``tokens`` after them, one by one with a cache.  Medians over ``repeats``
    turns, in each of which every model has its own; one more before them is not counted.
    """
    found: list[dict[str, list[float]]] = [{"prefill_ms": [], "decode_ms": []} for _ in models]
    for turn in range(repeats + 1):
        for model, times in zip(models, found, strict=True):
            first, *others = _write(model, ids, tokens)
            if turn:
                times["prefill_ms"].append(1e3 * first / ids.shape[1])
                times["decode_ms"] += [1e3 * second for second in others]
    return [{key: median(values) for key, values in times.items()} for times in found]


def time_layers(
    shapes: Mapping[str, Sequence[int]],
    patterns: Sequence[str],
    dtype: str = "bfloat16",
    tokens: Sequence[int] = (1, 128),
    repeats: int = 5,
    cold: int = 1 << 26,
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[dict[str, Any]]:
    """Yield a row for each shape (M, K), pattern and number of tokens: a packed layer beside a dense one.

    Weights are random and pruned by magnitude.  ``time_ms`` and ``dense_ms`` are medians of ``repeats`` products in
    turns, each on the next of several copies, of ``cold`` bytes together, so that none is found in a cache;
    ``error`` is how far the product is from that with the unpacked weight in float64, as a share of it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, (M, K) in shapes.items():
        dense = torch.randn(M, K, generator=generator).to(getattr(torch, dtype))
        for pattern in patterns:
            W = dense.where(parse(pattern).bind((M, K)).project(dense.float().abs()), 0)
            layer = PackedLinear.of(Entry(pack(W, pattern), {ALONE: name}), ALONE).to(device)
            W = W.to(device)
            for count in tokens:
                x = torch.randn(1, count, K, generator=generator).to(W)
                exact = linear(x.double(), W.double())
                error = float((layer(x) - exact).norm() / exact.norm())
                size = count_memory(layer)  # after it ran: it is laid out by then
                calls = (
                    _rotate(layer, size, cold, lambda own, x=x: own(x)),
                    _rotate(W, W.nbytes, cold, lambda own, x=x: linear(x, own)),
                )
                own_ms, dense_ms = _take_turns(calls, repeats, device)
                yield {
                    "layer": name,
                    "M": M,
                    "K": K,
                    "pattern": pattern,
                    "tokens": count,
                    "bytes": size,
                    "dense_bytes": W.nbytes,
                    "time_ms": own_ms,
                    "dense_ms": dense_ms,
                    "faster": dense_ms / own_ms,
                    "error": error,
                }


def _find_tensors(thing: object) -> Iterator[Tensor]:
    """All tensors in an object's attributes and theirs, and in place of one that is made of others, these."""
    if isinstance(thing, Tensor):
        flatten = getattr(thing, "__tensor_flatten__", None)
        yield from [getattr(thing, name) for name in flatten()[0]] if flatten else [thing]
    elif isinstance(thing, tuple | list):
        for part in thing:
            yield from _find_tensors(part)
    elif hasattr(thing, "__dict__"):
        yield from _find_tensors(list(vars(thing).values()))


@torch.inference_mode()
def _write(model: PreTrainedModel, ids: Tensor, tokens: int) -> list[float]:
    """Seconds to read a prompt, and for each token that is written after it."""
    cache, times = None, []
    for _ in range(tokens + 1):
        with Meter(ids.device) as meter:
            out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        times.append(meter.time_s)
    return times


def _rotate(thing: Any, size: int, cold: int, use: Callable[[Any], object]) -> Callable[[], object]:
    """A call that uses one copy after the other, of which there are enough to fill no cache."""
    copies = cycle([deepcopy(thing) for _ in range(max(1, cold // size))])
    return lambda: use(next(copies))


@torch.inference_mode()
def _take_turns(calls: Sequence[Callable[[], object]], repeats: int, device: str) -> list[float]:
    """The median milliseconds of each call; the first turn is not counted."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, own in zip(calls, times, strict=True):
            with Meter(device) as meter:
                call()
            if turn:
                own.append(1e3 * meter.time_s)
    return [median(own) for own in times]
