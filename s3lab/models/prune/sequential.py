"""Pruning a causal language model decoder layer by decoder layer, each on what the pruned layers before it give."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from s3lab.errors import DataError, SolveError
from s3lab.folder import claim
from s3lab.markup import table
from s3lab.models.prune.chunks import Chunk, cut_chunks
from s3lab.models.prune.flow import Flow
from s3lab.models.prune.jobs import Specs, choose, choose_jobs, read_tables, write_tables
from s3lab.models.prune.layerwise import Recipe, prune_layer, prune_measured
from s3lab.models.prune.moments import keep_moments, read_moments
from s3lab.models.prune.rundir import RunDir, layer_file
from s3lab.models.prune.source import describe_source, find_sequences
from s3lab.models.prune.wrapped import find_parts, name_parts
from s3lab.models.structure.decoder import Decoder, find_decoder
from s3lab.shapes import Integer
from s3lab.solvers import make_score, make_solver
from s3lab.solvers.base import ScoreSolver, Solver
from s3lab.solvers.wrap import Wrap, Wrapped
from s3lab.tensors.processes import ProcessGroup, find_processes
from s3lab.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Step(NamedTuple):
    """How far a run is: ``solved`` of ``total`` matrices, in layer ``layer`` of ``layers``, the last one's error."""

    solved: int
    total: int
    layer: int
    layers: int
    name: str
    error: float | None


@dataclass
class Run:
    """What `prune_model` did: the model, pruned in place, a row per matrix and per layer, and how it was made.

    ``manifest`` holds the settings and facts; ``damaged`` the files of the run directory that were found to be not as
    written, and were made again; ``wrapped``, by full name, the parts whose products wrapped matrices are.
    """

    model: PreTrainedModel
    matrices: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    manifest: dict[str, Any]
    damaged: list[str] = field(default_factory=list)
    wrapped: dict[str, Wrapped] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Share of the weights kept, over all matrices that were to be pruned."""
        sizes = [prod(row["shape"]) for row in self.matrices]
        return sum(row["density"] * n for row, n in zip(self.matrices, sizes, strict=True)) / sum(sizes)

    def _repr_html_(self) -> str:
        return table(self.matrices) + table(self.layers)


def prune_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    spec: Specs,
    solver: str | Solver | Mapping[str, str | Solver] = "best",
    *,
    calibration: str | Path | Integer[Tensor, "N L"] = "stdlib",
    sequences: int = 128,
    length: int = 256,
    damp: float | Literal["auto"] = 1e-2,
    refit: bool = False,
    refine: bool = False,
    salient: str | ScoreSolver | None = None,
    wrap: Wrap | None = None,
    held_out: float = 0.1,
    hessians: str = "pruned",
    hessian: str = "inputs",
    moments: str | Path | None = None,
    batch: int = 8,
    scarce: float | None = None,
    min_tokens: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool | Callable[[Step], object] = True,
    measure: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    every: int = 1,
    provenance: Mapping[str, Any] | None = None,
    distributed: bool | ProcessGroup = False,
) -> Run:
    """Prune the matrices in the decoder layers of a model, in place, and return the Run.

    Within a layer the matrices are pruned in the order in which their inputs become available, each on second moments
    of its inputs in the model as pruned so far; ``hessians="dense"`` takes those of the dense model, and from the
    folder ``moments``, if it is given: made there by the first run, they spare all others with the same model and
    calibration every forward pass, and how far the layers' outputs are apart is then not measured.  With
    ``hessian="loss"`` tokens and outputs of a matrix count as much as the dense model's loss hangs on them: H ⊗ diag G,
    as `measure_fisher` has it, in what is least and in the errors of the rows; made anew when a run goes on.
    ``calibration`` is a source of text as `corpus.tokens` takes it, of which ``sequences`` of ``length`` tokens are
    drawn with ``seed``, or ready sequences (N, L) int64, which need no tokenizer; a share ``held_out`` of them enters
    no second moment and gives the held-out errors, by which ``damp="auto"`` picks the damping of each matrix.
    ``refit``, ``refine`` and ``salient`` are those of `prune`.  With ``wrap`` each matrix becomes A S B as `s3lab.wrap`
    has it, stored as that product, and its row tells in ``extra`` what A and B hold; the run has them in ``wrapped``.
    Weights keep their dtype, the model its mode.

    ``spec`` and ``solver`` are for all matrices, or tables of globs over their names, with or without what stands
    before the list of layers, of which the first match wins; the spec "dense" leaves a matrix alone.  A matrix that
    is not given every token, such as an expert, and saw fewer than ``min_tokens`` (its inputs, if None) is left
    dense, or pruned with damping ``scarce``, and its row says so in ``note``.

    A coupled spec, or a name of `structures.STRUCTURES` with a budget such as "mlp-channels keep 75%", takes in each
    layer the matrices that it names, as soon as the inputs of all that lead are known; those that follow have no error
    and say whom in ``note``.  In a list of specs and tables, or a text with ``;`` between specs, each is for what those
    before it left; what none takes stays dense.

    ``batch`` sequences at a time are on ``device`` (the model's own, if None), with one layer and its second moments;
    hidden states rest on the CPU, or with ``out`` on disk.  ``out`` names a run directory: the same call on the same
    dense model goes on after the last whole layer, and on a CPU ends with the same bits.  ``progress`` is a bar, or
    a function of each Step; figures of ``measure(model)`` after every so many layers, and after the last, join that
    layer's row; ``provenance`` is kept in the manifest.

    With ``distributed`` all processes of torch's default group make this call, on the same model: each sends its share
    of the sequences through it, second moments are summed over all, and `prune` shares out the rows.  All end with
    the same model, that of one process to rounding.  They share the directory ``out``, which the first one keeps,
    as it alone reports progress, and any other number of processes can go on from there.  An error in one ends all.

    Raises SpecError for specs that fit no matrix and globs that match none, DataError for a model that is not a
    chain of layers, too few sequences, a run directory of other settings, of other files or that another process holds,
    and processes that were not given the same, SolveError where a solver cannot go on.
    Cost: two forward passes of each layer over all sequences, of the dense and of the pruned model, the second moments,
    and the solver; with the loss, a forward and a backward pass of the whole model on its own device, one sequence at
    a time, and second moments for each matrix, where otherwise those that share an input share one.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    >>> model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    >>> run = prune_model(model, None, "2:4", "wanda", calibration=torch.arange(64).view(4, 16), progress=False)
    >>> run.density, len(run.matrices), [row["layer"] for row in run.layers]
    (0.5, 14, [0, 1])
    """

    tables = read_tables(spec)
    solvers = solver if isinstance(solver, Mapping) else {"*": solver}
    solvers = {glob: make_solver(value) for glob, value in solvers.items()}
    if moments is not None and hessians != "dense":
        raise DataError(
            f"moments in a folder are those of the dense model, not of the {hessians} one: hessians='dense'"
        )
    options: dict[str, Any] = {
        "damp": damp,
        "refit": refit,
        "refine": refine,
        "salient": make_score(salient),
        "wrap": wrap,
        "hessians": hessians,
        "hessian": hessian,
        "scarce": scarce,
        "min_tokens": min_tokens,
    }
    processes, decoder, place = find_processes(distributed), find_decoder(model), torch.device(device or model.device)
    if wrap and processes.size > 1:
        raise SolveError("a core is wrapped by one process: leave distributed off")
    ids = find_sequences(tokenizer, calibration, sequences, length, seed)
    recipe = Recipe(choose_jobs(decoder, model.config, tables), choose(decoder, solvers), **options)
    chunks, weighted = cut_chunks(ids, held_out, batch, seed), hessian == "loss"
    source = describe_source(model, ids, held_out, batch, seed)
    settings = {
        **source,
        "spec": write_tables(tables),
        "solver": {glob: repr(value) for glob, value in solvers.items()},
        **options,
        "salient": None if salient is None else repr(options["salient"]),
        "wrap": None if wrap is None else repr(wrap),
        "moments": moments is not None,
        "device": place.type,
        "versions": {"python": platform.python_version(), "s3lab": __version__}
        | {package: version(package) for package in ("torch", "transformers")},
    }
    facts = {
        "sequences": len(ids),
        "length": ids.shape[1],
        "calibration_tokens": sum(chunk.ids.numel() for chunk in chunks if not chunk.held_out),
        "threads": torch.get_num_threads(),
        "processes": processes.size,
        "provenance": dict(provenance or {}),
    }
    own = out if processes.rank == 0 else None
    with torch.no_grad(), processes.united(), claim(own), as_evaluated(model, decoder):
        _check_alike(processes, settings)
        rundir = None if out is None else RunDir(out, settings, facts, processes)
        done = sum(len(record["matrices"]) for record in rundir.layers) if rundir else 0
        files: Sequence[Path] = ()
        if moments is not None:
            files = keep_moments(
                moments,
                {**source, **({"hessian": hessian} if weighted else {})},
                lambda: Flow(model, decoder, chunks, place, processes=processes, weighted=weighted),
            )
        with _report(processes.rank == 0 and progress, recipe.total, done) as report:
            records, wrapped = _walk(
                model, decoder, chunks, recipe, place, rundir, processes, measure, every, report, files
            )
    return Run(
        model,
        [row for record in records for row in record["matrices"]],
        [record["layer"] for record in records],
        {"settings": settings, "facts": facts},
        rundir.damaged if rundir else [],
        wrapped,
    )


def _walk(
    model: PreTrainedModel,
    decoder: Decoder,
    chunks: list[Chunk],
    recipe: Recipe,
    place: torch.device,
    rundir: RunDir | None,
    processes: ProcessGroup,
    measure: Callable[[PreTrainedModel], Mapping[str, float]] | None,
    every: int,
    report: Callable[[Step], object],
    measured: Sequence[Path],
) -> tuple[list[dict[str, Any]], dict[str, Wrapped]]:
    """Take all layers in turn, those that are finished from the run directory, and return their records.

    With them come the parts of what is wrapped, by full name.  ``measured`` are the files of their second moments,
    where they need no stream to be pruned.
    """
    records, wrapped = list(rundir.layers) if rundir else [], {}
    finished, count = len(records), len(decoder.layers)
    # without an intact state, the finished layers are walked through again, which gives it bit by bit
    start = finished if finished == count or measured else rundir.usable_state() if rundir else 0
    flow = None
    if not measured and finished < count:  # begun while the model is dense
        flow = Flow(model, decoder, chunks, place, rundir, processes, recipe.hessian == "loss")
    if rundir:
        for index in range(start):
            wrapped |= _restore(rundir, decoder, index)
        if finished == count:
            rundir.close()
            return records, wrapped
    if flow and start == 0:
        flow.embed()
    solved = sum(len(record["matrices"]) for record in records)
    for index in range(start, count):

        def tell(name: str, error: float | None, index: int = index) -> None:
            nonlocal solved
            solved += 1
            report(Step(solved, recipe.total, index, count, name, error))

        began = time.perf_counter()
        with _resident(decoder.layers[index], place):
            if flow is None:
                pruned = prune_measured(decoder, index, read_moments(measured[index]), recipe, processes, tell)
                apart: dict[str, float | None] = {"output_error": None, "output_error_test": None}
            elif rundir and index < finished:
                flow.advance_dense(index)
                wrapped |= _restore(rundir, decoder, index)
                flow.advance_pruned(index)
                flow.drop(index)
                continue
            else:
                pruned, apart = prune_layer(flow, index, recipe, tell)
        before = records[-1]["layer"]["time_s"] if records else 0.0
        layer = {"layer": index, **apart, "time_s": before + time.perf_counter() - began}
        if measure and ((index + 1) % every == 0 or index + 1 == count):
            layer.update(measure(model))
        records.append({"matrices": pruned.rows, "layer": layer})
        wrapped |= pruned.wrapped
        if rundir:
            rundir.commit(_weights(decoder, index, pruned.rows) | name_parts(pruned.wrapped), records[-1])
        if flow:
            flow.drop(index)
    if rundir:
        rundir.close()
    return records, wrapped


def _weights(decoder: Decoder, index: int, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    matrices = decoder.matrices[index]
    return {name: matrices[name].weight for name in (f"{decoder.name}.{index}.{row['name']}" for row in rows)}


def _restore(rundir: RunDir, decoder: Decoder, index: int) -> dict[str, Wrapped]:
    """Put a finished layer's weights in place, and return the parts of those that are wrapped."""
    stored, matrices = rundir.load(layer_file(index)), decoder.matrices[index]
    for name in stored.keys() & matrices.keys():
        matrices[name].weight.copy_(stored[name])
    return find_parts(stored)


@contextmanager
def as_evaluated(model: PreTrainedModel, decoder: Decoder) -> Iterator[None]:
    """Have the model in evaluation mode, and its experts, if any, multiply one by one as its own code says."""
    training, experts = model.training, getattr(model.config, "_experts_implementation", "eager")
    stacked = any(m.expert is not None for matrices in decoder.matrices for m in matrices.values())
    model.eval()
    if stacked:
        model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.train(training)
        if stacked:
            model.set_experts_implementation(experts)


@contextmanager
def _resident(layer: nn.Module, place: torch.device) -> Iterator[None]:
    home = next(layer.parameters()).device
    layer.to(place)
    try:
        yield
    finally:
        layer.to(home)


@contextmanager
def _report(progress: bool | Callable[[Step], object], total: int, done: int) -> Iterator[Callable[[Step], object]]:
    """Yield what hears of each step: the function given, a bar, or nothing."""
    if progress is False:
        yield lambda step: None
    elif callable(progress):
        yield progress
    else:
        from tqdm.auto import tqdm

        with tqdm(total=total, initial=done, unit="matrix") as bar:

            def show(step: Step) -> None:
                error = "" if step.error is None else f", error {step.error:.2%}"
                bar.set_postfix_str(f"layer {step.layer + 1}/{step.layers}, {step.name}{error}", refresh=False)
                bar.update(step.solved - bar.n)

            yield show


def _check_alike(processes: ProcessGroup, settings: dict[str, Any]) -> None:
    """Raise DataError where the processes of a group were not given the same."""
    seal = float(int(hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12], 16))
    if processes.max(seal) + processes.max(-seal):
        raise DataError("the processes have different models, sequences or settings: give all of them the same")
