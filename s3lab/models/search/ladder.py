"""The ladders of a model: for each matrix, or coupling of a layer, the rungs of its family and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

from s3lab.algebra.patterns import parse
from s3lab.errors import SpecError
from s3lab.models.prune.jobs import DENSE, Job, check_texts, choose
from s3lab.models.search.cost import Cost
from s3lab.models.search.families import Family, read_family
from s3lab.models.structure.decoder import Decoder, Matrix
from s3lab.models.structure.structures import fit, read_couplings
from s3lab.solvers.base import ALONE

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_LAYER = ".*"  # the end of a glob that is for a whole layer


@dataclass(frozen=True, eq=False)
class Rung:
    """A spec and what it costs; the last rung of a ladder is dense and has no job."""

    text: str
    cost: float
    job: Job | None


@dataclass(frozen=True, eq=False)
class Ladder:
    """The rungs of a matrix, or of those of a layer that a coupling prunes together, cheapest first, dense last.

    ``glob`` is what a table of specs calls it.
    """

    glob: str
    layer: int
    matrices: Mapping[str, Matrix]
    rungs: tuple[Rung, ...]

    @property
    def costs(self) -> list[float]:
        """What each rung costs."""
        return [rung.cost for rung in self.rungs]

    @property
    def shares(self) -> list[float]:
        """What each rung costs, as a share of the dense one."""
        return [rung.cost / self.rungs[-1].cost for rung in self.rungs]

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights of its matrices (views) by name."""
        return {matrix.name: matrix.weight for matrix in self.matrices.values()}


def build_ladders(
    decoder: Decoder, config: PretrainedConfig, families: Mapping[str, str], cost: Cost
) -> tuple[list[Ladder], list[str]]:
    """Return the ladders of a model by a table of globs, and the matrices that no family takes, which stay dense.

    A family is for each matrix that its glob decides, or, where it is a coupling, for those of each layer that it
    names; of couplings there can be one.  The value "dense" leaves matrices alone.  Rungs that cost as much as the
    dense weight are left out.

    Raises SpecError for a family that fits no matrix, or leaves it no rung, and for a second coupling.
    """
    found = {glob: None if text == DENSE else read_family(text) for glob, text in families.items()}
    decided = choose(decoder, {glob: glob for glob in families})
    single: list[Ladder] = []
    coupled: list[Ladder] = []
    for glob, family in found.items():
        if family is None:
            continue
        couplings = bool(read_couplings(next(iter(family)), config))
        if couplings and coupled:
            raise SpecError(f"the family {family} is a second coupling: a budget is shared out over one at a time")
        for index, matrices in enumerate(decoder.matrices):
            own, head = {name: m for name, m in matrices.items() if decided[name] == glob}, f"{decoder.name}.{index}"
            if couplings and own:

                def read(text: str, own: dict[str, Matrix] = own, head: str = head) -> Job:
                    return Job(*fit(read_couplings(text, config), own, head))

                coupled.append(_build(family, head + _LAYER, index, read, cost))
            elif not couplings:
                single += [_build(family, n, index, partial(_read, matrix=m), cost) for n, m in own.items()]
    if not single + coupled:
        raise SpecError("all matrices are to stay dense: give a family for some of them")
    taken = {name for ladder in single + coupled for name in ladder.weights}
    return single + coupled, [name for matrices in decoder.matrices for name in matrices if name not in taken]


def check_families(families: Mapping[str, str]) -> None:
    """Raise SpecError for a text that is no family of specs, before there is a model to climb its rungs.

    >>> check_families({"*.mlp.*": "mlp-channels keep {p}%", "*": "dense"})
    """
    check_texts([next(iter(read_family(text))) for text in families.values() if text != DENSE])


def write_table(ladders: Sequence[Ladder], rungs: Sequence[int], dense: Sequence[str]) -> dict[str, str]:
    """Return the table of specs by glob in which each ladder has the rung chosen, as `prune_model` takes it.

    Names of single matrices come first, so that the globs of couplings decide what they leave.
    """
    table = {ladder.glob: ladder.rungs[rung].text for ladder, rung in zip(ladders, rungs, strict=True)}
    alone = {glob: text for glob, text in table.items() if not glob.endswith(_LAYER)}
    return alone | dict.fromkeys(dense, DENSE) | table


def _build(family: Family, glob: str, layer: int, read: Callable[[str], Job], cost: Cost) -> Ladder:
    """The ladder of what ``read`` makes of each text of a family."""
    jobs: dict[str, Job] = {}
    for text in family:
        try:
            jobs[text] = read(text)
        except SpecError as error:
            if family.open and family.last is None and jobs:
                break  # past the last count that fits
            if not family.open or (text == [*family][-1] and not jobs):
                raise SpecError(f"the family {family} does not fit {glob}: {error}") from error
    matrices = next(iter(jobs.values())).matrices
    shapes = {name: (matrix.weight.shape[0], matrix.weight.shape[1]) for name, matrix in matrices.items()}
    bits = 8 * next(iter(matrices.values())).weight.element_size()
    dense = Rung(DENSE, cost(None, shapes, bits), None)
    rungs = sorted((Rung(text, cost(job.spec, shapes, bits), job) for text, job in jobs.items()), key=lambda r: r.cost)
    rungs = [rung for rung, more in pairwise([*rungs, dense]) if rung.cost < min(more.cost, dense.cost)]
    if not rungs:
        raise SpecError(f"the family {family} has no rung that costs less than the dense {glob}: give another")
    return Ladder(glob, layer, matrices, (*rungs, dense))


def _read(text: str, matrix: Matrix) -> Job:
    pattern = parse(text)
    pattern.bind((matrix.weight.shape[0], matrix.weight.shape[1]))
    return Job(pattern, {ALONE: matrix})
