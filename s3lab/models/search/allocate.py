"""Which matrix of a model gets how much of a budget."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from s3lab.errors import SpecError
from s3lab.files import write
from s3lab.folder import claim
from s3lab.markup import table
from s3lab.models.prune.chunks import cut_chunks
from s3lab.models.prune.flow import Flow
from s3lab.models.prune.moments import keep_moments
from s3lab.models.prune.sequential import as_evaluated
from s3lab.models.prune.source import describe_source, find_sequences
from s3lab.models.search.cost import COSTS, Cost
from s3lab.models.search.evolve import Search
from s3lab.models.search.knapsack import Choice
from s3lab.models.search.ladder import build_ladders, write_table
from s3lab.models.search.methods import METHODS, TOLERANCE, Task
from s3lab.models.structure.decoder import find_decoder
from s3lab.shapes import Integer
from s3lab.solvers import make_solver
from s3lab.solvers.base import Solver

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "allocation.json"
_DIGITS, _LONGEST = frozenset("0123456789./%"), 20


@dataclass(frozen=True)
class Allocation(Mapping[str, str]):
    """A table of specs by glob or name, as `prune_model` takes it, and why: ``rows``, one a ladder, and ``facts``.

    A row tells the spec chosen, what it costs and what share of the dense cost that is, the relative error of its
    solve, and the ``curve``, the error of each rung, where the method has solved them.  ``share`` is what all cost of
    the dense cost.  Raises KeyError for a glob that is not in it.

    >>> Allocation({"*": "2:4"}, [], {"share": 0.5})["*"]
    '2:4'
    """

    table: dict[str, str]
    rows: list[dict[str, Any]]
    facts: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, glob: str) -> str:
        return self.table[glob]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def share(self) -> float:
        """What all cost, as a share of the dense cost."""
        return self.facts["share"]

    @property
    def record(self) -> dict[str, Any]:
        """All that is known of it, as JSON holds it."""
        return {**self.facts, "rows": self.rows}

    def __str__(self) -> str:
        counts = Counter(row["spec"] for row in self.rows)
        told = ", ".join(f"{text} ×{count}" for text, count in sorted(counts.items(), key=lambda item: -item[1]))
        return f"{self.share:.2%} of {self.facts['cost']} by {self.facts['method']}: {told}"

    def _repr_html_(self) -> str:
        return table([{key: value for key, value in row.items() if key != "curve"} for row in self.rows])


def allocate(
    model: PreTrainedModel,
    family: str | Mapping[str, str],
    target: str | float,
    method: str = "loss",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    cost: str | Cost = "bytes",
    solver: str | Solver = "sparsegpt",
    calibration: str | Path | Integer[Tensor, "N L"] = "stdlib",
    sequences: int = 128,
    length: int = 256,
    damp: float | Literal["auto"] = 1e-2,
    held_out: float = 0.1,
    scarce: float | None = None,
    min_tokens: int | None = None,
    moments: str | Path | None = None,
    batch: int = 8,
    seed: int = 0,
    windows: int = 8,
    search: Search | None = None,
    out: str | Path | None = None,
    device: torch.device | str | None = None,
    progress: bool | Callable[[int, str], object] = True,
) -> Allocation:
    """Return a spec for each matrix, chosen from a family so that all meet a budget: a table for `prune_model`.

    ``family`` is a text with an open place, such as ``{n}:16``, ``{n}:8@1x2``, ``{p}% columns`` or
    ``mlp-channels keep {p}%``, as `read_family` takes it, or a table of globs with such texts and "dense".
    ``target`` is a share of what the dense matrices of the family cost, ``"50%"`` or 0.5, which is met within 0.5 %.
    ``cost`` is "bytes" as the packing codec counts them, "weights" kept, or a function such as
    `search.cost.MeasuredTime`.

    ============  ==================================================================================================
    ``uniform``   the same share of each; a single spec where one costs just so
    ``owl``       more of decoder layers with more outliers
    ``error``     least sum of squared relative output errors, each rung solved once, by a knapsack
    ``loss``      the same, times how the loss of ``windows`` calibration sequences answers to each matrix's error
    ``search``    from there on by evolution, on the perplexity of these sequences
    ============  ==================================================================================================

    Errors are those of ``solver`` with ``damp`` on second moments of the dense model's inputs, one passage for all
    rungs; calibration is that of `prune_model`.  ``moments`` is its folder too.  ``out`` keeps moments, curves and
    ``allocation.json``, the record: the same call goes on there, and other targets, methods and costs solve nothing
    again.  ``progress`` is a bar, or a function of each solve's layer and spec.  The model is as it was.

    Raises SpecError for a family that does not fit, and a target that it does not reach within 0.5 %, saying what it
    does; DataError as `prune_model` does.  Cost: a forward pass of each layer, a solve of each
    matrix a rung, and of ``loss`` and ``search`` a backward pass over ``windows``.

    >>> from transformers import Qwen2Config, Qwen2ForCausalLM
    >>> sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    >>> model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=2))
    >>> text = torch.arange(64).view(4, 16)
    >>> found = allocate(model, "{n}:16", "50%", cost="weights", calibration=text, progress=False)
    >>> len(found), f"{found.share:.1%}", set(found.values()) <= {f"{n}:16" for n in range(1, 16)} | {"dense"}
    (14, '50.0%', True)
    """
    if method not in METHODS:
        raise SpecError(f"no method is called {method!r}: use one of {', '.join(METHODS)}")
    if isinstance(cost, str) and cost not in COSTS:
        raise SpecError(f"no cost is called {cost!r}: use {' or '.join(COSTS)}, or a function")
    families, share = {"*": family} if isinstance(family, str) else dict(family), read_target(target)
    decoder = find_decoder(model)
    weigh = COSTS[cost] if isinstance(cost, str) else cost
    ladders, dense = build_ladders(decoder, model.config, families, weigh)
    dense_cost = sum(ladder.rungs[-1].cost for ladder in ladders)
    lowest = sum(ladder.rungs[0].cost for ladder in ladders) / dense_cost
    if lowest > share:
        raise SpecError(f"{share:.4%} of the dense cost is below {lowest:.4%}, the least of {family!r}: give more")
    ids = find_sequences(tokenizer, calibration, sequences, length, seed)
    chunks = cut_chunks(ids, held_out, batch, seed)
    seen = torch.cat([chunk.ids for chunk in chunks if not chunk.held_out])[:windows]
    source = describe_source(model, ids, held_out, batch, seed)
    place = torch.device(device or model.device)
    with _folder(out) as folder, as_evaluated(model, decoder), _report(progress) as tell:

        def find_moments() -> Sequence[Path]:
            with torch.no_grad():
                return keep_moments(moments or folder / "moments", source, lambda: Flow(model, decoder, chunks, place))

        options = {"damp": damp, "scarce": scarce, "min_tokens": min_tokens}
        task = Task(
            model, decoder, ladders, share, share * dense_cost, find_moments, source, folder, make_solver(solver),
            options, seen, search or Search(seed=seed), tell,
        )  # fmt: skip
        choice, told = METHODS[method](task)
        reached = choice.cost / dense_cost
        if abs(choice.cost - task.budget) > TOLERANCE * task.budget:
            raise SpecError(
                f"the nearest that {method!r} comes to {share:.4%} with {family!r} is {reached:.4%}: give that, or a "
                "finer family"
            )
        facts = {
            "method": method,
            "family": families,
            "target": share,
            "cost": cost if isinstance(cost, str) else repr(cost),
            "share": reached,
            "solver": repr(task.solver) if task.errors else None,
            "damp": damp,
            "source": source,
            "loss": choice.loss,
            "bound": choice.bound,
            "price": choice.price,
            **told,
        }
        found = Allocation(write_table(ladders, choice.rungs, dense), _write_rows(task, choice), facts)
        if out is not None:
            write(folder / RECORD, (json.dumps(found.record, indent=1) + "\n").encode())
    return found


def read_target(target: str | float) -> float:
    """Return a share from "50%" or 0.5; SpecError for what is none above 0 and up to 1.

    >>> read_target("62.5%"), read_target(0.5)
    (0.625, 0.5)
    """
    share = target if isinstance(target, float | int) else 0.0
    if isinstance(target, str) and len(target) < _LONGEST and _DIGITS.issuperset(target):
        with suppress(ValueError, ZeroDivisionError):
            share = float(Fraction(target.removesuffix("%")) / (100 if target.endswith("%") else 1))
    if not 0 < share <= 1:
        told = f"{target[:_LONGEST]!r}" if isinstance(target, str) else f"{target!r}"
        raise SpecError(f"{told} is no share of the dense cost: give one above 0, such as 50% or 0.5")
    return float(share)


def _write_rows(task: Task, choice: Choice) -> list[dict[str, Any]]:
    rows = []
    for place, (ladder, rung) in enumerate(zip(task.ladders, choice.rungs, strict=True)):
        chosen = ladder.rungs[rung]
        row = {"name": ladder.glob, "spec": chosen.text, "cost": chosen.cost, "share": ladder.shares[rung]}
        if task.errors:
            curve = {own.text: error for own, error in zip(ladder.rungs, task.errors[place], strict=True)}
            row |= {"error": task.errors[place][rung], "curve": curve}
        rows.append(row)
    return rows


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """The folder of an allocation, or one that is gone afterwards."""
    if out is not None:
        with claim(out):
            yield Path(out)
        return
    with TemporaryDirectory(prefix="s3lab-") as scratch:
        yield Path(scratch)


@contextmanager
def _report(progress: bool | Callable[[int, str], object]) -> Iterator[Callable[[int, str], object]]:
    """Yield what hears of each solve: the function given, a bar, or nothing."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda layer, text: None
    else:
        from tqdm.auto import tqdm

        with tqdm(unit="solve") as bar:

            def show(layer: int, text: str) -> None:
                bar.set_postfix_str(f"layer {layer}, {text}", refresh=False)
                bar.update()

            yield show
