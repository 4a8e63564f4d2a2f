"""What is pruned together in a decoder layer, under which spec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from s3lab.algebra.couple import Coupled
from s3lab.algebra.patterns import parse
from s3lab.algebra.spec import Pattern
from s3lab.errors import SpecError
from s3lab.models.structure.decoder import Decoder, Matrix
from s3lab.models.structure.structures import STRUCTURES, fit, read_couplings
from s3lab.solvers.base import ALONE
from s3lab.wildcards import assign

if TYPE_CHECKING:
    from transformers import PretrainedConfig

T = TypeVar("T")
DENSE = "dense"
One = str | Pattern
Specs = One | Mapping[str, One] | Sequence[One | Mapping[str, One]]
Tables = list[dict[str, list[One]]]


@dataclass(frozen=True, eq=False)
class Job:
    """Matrices of a layer that are pruned together, by the names that the spec has for them; one alone is `ALONE`."""

    spec: Pattern
    matrices: Mapping[str, Matrix]

    @property
    def leaders(self) -> dict[str, Matrix]:
        """The matrices whose inputs must be known: all but those that follow."""
        followers = self.spec.followers if isinstance(self.spec, Coupled) else frozenset()
        return {name: matrix for name, matrix in self.matrices.items() if name not in followers}


def read_tables(specs: Specs) -> Tables:
    """Return specs as tables of globs, of which each is for the matrices that those before it left.

    >>> read_tables("mlp-channels keep 75%; 2:4")
    [{'*': ['mlp-channels keep 75%', '2:4']}]
    >>> read_tables(["kv-groups keep 1", {"*.up_proj": "2:4", "*": "dense"}])
    [{'*': ['kv-groups keep 1']}, {'*.up_proj': ['2:4'], '*': ['dense']}]
    """
    if isinstance(specs, Mapping):
        return [{glob: _split(value) for glob, value in specs.items()}]
    if isinstance(specs, str | Pattern):
        return [{"*": _split(specs)}]
    return [table for item in specs for table in read_tables(item)]


def write_tables(tables: Tables) -> dict[str, str]:
    """Return tables as one, the specs of a glob between ``;``.

    >>> write_tables(read_tables(["mlp-channels keep 75%", parse("2:4")]))
    {'*': 'mlp-channels keep 75%; 2:4'}
    """
    told: dict[str, list[str]] = {}
    for table in tables:
        for glob, specs in table.items():
            told.setdefault(glob, []).extend(map(str, specs))
    return {glob: "; ".join(specs) for glob, specs in told.items()}


def check_texts(specs: Specs) -> None:
    """Raise SpecError for a text that stands for no spec, before there is a model to read it for.

    >>> check_texts({"*.mlp.*": "mlp-channels keep 75%; 2:4", "*": "dense"})
    """
    for spec in (spec for table in read_tables(specs) for told in table.values() for spec in told):
        if isinstance(spec, str) and spec != DENSE and spec.partition(" keep ")[0].strip() not in STRUCTURES:
            parse(spec)


def choose(decoder: Decoder, table: Mapping[str, T], names: Iterable[str] | None = None) -> dict[str, T]:
    """Return the value of each matrix, or of the ``names``, by a table of globs.

    Globs match names with or without what precedes the list of layers.
    """
    head, dot, _ = decoder.name.rpartition(".")
    every = [name for matrices in decoder.matrices for name in matrices]
    return assign(every if names is None else names, table, root=head + dot)


def choose_jobs(decoder: Decoder, config: PretrainedConfig, tables: Tables) -> list[list[Job]]:
    """Return the jobs of each layer, as tables of globs choose them.

    A spec for one matrix takes all that its glob decides; a coupling takes only what it names, once in each layer where
    its glob decides anything.  What none takes stays dense.

    Raises SpecError for a spec that takes nothing or does not fit, or where nothing is left to prune.
    """
    jobs: list[list[Job]] = [[] for _ in decoder.layers]
    free = [name for matrices in decoder.matrices for name in matrices]
    for table in tables:
        decided = choose(decoder, {glob: glob for glob in table}, free)
        for glob, spec in ((glob, spec) for glob, specs in table.items() for spec in specs):
            left = {name for name in free if decided.get(name) == glob}
            if not left:
                raise SpecError(f"{spec} takes nothing: all that {glob!r} matches is decided before it")
            couplings = () if spec == DENSE else read_couplings(spec, config)
            taken = set() if couplings else left
            for index, matrices in enumerate(decoder.matrices):
                own = {name: matrix for name, matrix in matrices.items() if name in left}
                if couplings and own:
                    jobs[index].append(job := Job(*fit(couplings, own, f"{decoder.name}.{index}")))
                    taken |= {matrix.name for matrix in job.matrices.values()}
                elif spec != DENSE:
                    jobs[index] += [Job(_read(spec, matrix), {ALONE: matrix}) for matrix in own.values()]
            free = [name for name in free if name not in taken]
    if not any(jobs):
        raise SpecError("all matrices are to stay dense: give a spec for some of them")
    return jobs


def _split(spec: One) -> list[One]:
    return [part.strip() for part in spec.split(";")] if isinstance(spec, str) else [spec]


def _read(spec: One, matrix: Matrix) -> Pattern:
    pattern = parse(spec) if isinstance(spec, str) else spec
    try:
        pattern.bind((matrix.weight.shape[0], matrix.weight.shape[1]))
    except SpecError as error:
        raise SpecError(f"{matrix.name}: {error}") from error
    return pattern
