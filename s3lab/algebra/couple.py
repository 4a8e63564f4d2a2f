"""Couplings: blocks of several tensors that share one fate, scopes of several tensors that share one budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from s3lab.algebra import text
from s3lab.algebra.coupled import CoupledPartition, Shape
from s3lab.algebra.layout import Layout
from s3lab.algebra.partition import Partition
from s3lab.algebra.sizes import ONE, Keep, Size, Sizes, write_keep, write_sizes
from s3lab.algebra.spec import MATRIX, Block, Pattern, Scope, View, bind_sizes, check_shape, cut, read_sizes
from s3lab.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Member:
    """A tensor of a coupling: its name, its view and block, and the order in which its grid's modes are taken.

    A member that ``follows`` is pruned with the blocks of the others and has no say in which: the rows of a layer
    whose outputs a removed column of the next would read.  Raises SpecError for a name that is empty or has a double
    quote, and for a block of other modes than the view.

    >>> str(Member("gate_proj", Block((1, "K")), follows=True))
    'gate_proj: (1,K) follows'
    """

    name: str
    block: Block
    view: View = MATRIX
    order: tuple[int, ...] = ()
    follows: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or '"' in self.name:
            raise SpecError(f"{self.name!r} names no tensor: give a text without double quotes")
        modes = len(self.view.shape)
        if len(self.block.shape) != modes:
            raise SpecError(f"the block {self.block} of {self.name} has not the {modes} modes of its view {self.view}")

    def grid(self, shape: Shape) -> tuple[Layout, Layout]:
        """Return the grid of blocks on a weight (M, K), its modes in order, and the block."""
        grid, block = cut(self.view.on(*shape), bind_sizes(self.block.shape, *shape), "block", str(self))
        if self.order:
            if sorted(self.order) != list(range(grid.rank)):
                raise SpecError(
                    f"{self}: by {self.order} is no order of the {grid.rank} modes of its grid, {_extents(grid)} "
                    f"blocks on {shape}: name each of the modes {tuple(range(grid.rank))} once"
                )
            grid = Layout.of(*(grid[mode] for mode in self.order))
        return grid, block

    @property
    def told_grid(self) -> str:
        """The grid of blocks in sizes, as far as a block divides its view mode by mode."""
        pairs = zip(self.view.shape, self.block.shape, strict=True)
        cut = [whole / part if isinstance(whole, Size) and isinstance(part, Size) else None for whole, part in pairs]
        told = ", ".join("?" if size is None else str(size) for size in cut)
        return f"{self.name}, a grid of ({told}) blocks"

    def __str__(self) -> str:
        view, block = self.view, self.block.shape
        return text.write_member(text.Member(self.name, view.shape, view.stride, block, self.order, self.follows))


@dataclass(frozen=True)
class Group:
    """Tensors whose blocks at one place of their grids share one fate, and the scope they compete in.

    Grids are compared by their extents above 1.  ``scope`` counts blocks along the modes of the first tensor's grid;
    None is the whole grid.  Raises SpecError without tensors, and where all of them follow.

    >>> group = Group((Member("q", Block((64, "K"))), Member("o", Block(("M", 64)))))
    >>> layouts = group.bind({"q": (128, 32), "o": (48, 128)})
    >>> [(name, *(mode.size for mode in layout)) for name, layout in layouts.items()]
    [('q', 1, 2, 2048), ('o', 1, 2, 3072)]
    """

    members: tuple[Member, ...]
    scope: Sizes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))
        if self.scope is not None:
            object.__setattr__(self, "scope", read_sizes(self.scope, "the scope"))
        if not self.members:
            raise SpecError("a group of no tensors couples nothing: give at least one")
        if all(member.follows for member in self.members):
            raise SpecError(f"{self}: all tensors follow, and none says what a block costs: let one lead")

    def bind(self, shapes: Mapping[str, Shape]) -> dict[str, Layout]:
        """Return for each tensor its canonical layout (scopes, blocks, elements); SpecError where grids differ."""
        first = self.members[0]
        leader, _ = first.grid(shapes[first.name])
        grids = {}
        for member in self.members:
            try:
                grids[member] = member.grid(shapes[member.name])
            except SpecError as error:
                raise SpecError(f"{error}\n    to match {_extents(leader)} blocks of {first.name}") from None
        extents = _extents(leader)
        if self.scope is not None:
            extents = bind_sizes(self.scope, *shapes[first.name])
            if len(extents) != leader.rank:
                raise SpecError(
                    f"the scope {write_sizes(self.scope)} of {self} has {len(extents)} modes and the grid of "
                    f"{first.name}, {_extents(leader)}, has {leader.rank}"
                )
            cut(leader, extents, "scope", str(self))
        extents = tuple(n for n, size in zip(extents, _extents(leader), strict=True) if size > 1) or (1,)
        layouts = {}
        for member, (grid, block) in grids.items():
            if _proper(_extents(grid)) != _proper(_extents(leader)):
                raise SpecError(
                    f"the grids of {first.name} and {member.name} do not match: {_extents(leader)} blocks on "
                    f"{shapes[first.name]} and {_extents(grid)} on {shapes[member.name]}; their extents above 1 must "
                    "be the same, in the same order: change a block, or the order with 'by'"
                )
            modes = [mode for mode in grid if mode.size > 1] or [grid[0]]
            scopes, blocks = cut(Layout.of(*modes), extents, "scope", str(self))
            layouts[member.name] = Layout.of(scopes, blocks, block)
        return layouts

    def __str__(self) -> str:
        told = " & ".join(str(member) for member in self.members)
        return told if self.scope is None else f"{told} / {write_sizes(self.scope)}"


@dataclass(frozen=True, repr=False)
class Coupled(Pattern):
    """Groups of tensors whose scopes at one place share one budget: ``keep`` of all their blocks.

    As text, tensors of a group stand between ``&`` and groups between ``|``:

    ==============================================  ==============================================================
    ``down: (M,1) & up: (1,K) follows keep 75%``    3 of 4 columns with the rows that feed them
    ``q: (64,K) & o: (M,64) keep 8``                8 heads of 64: rows of q with columns of o
    ``q: (1,1) & k: (1,1) / (1,4) keep 2``          one 2:4 mask for two tensors
    ``q: (1,1) / (1,4) | k: (1,1) / (1,4) keep 4``  4 of the 8 weights at one place of either tensor
    ``q: (1,1) | k: (1,1) | v: (1,1) keep 50%``     half of the weights of all three
    ==============================================  ==============================================================

    A tensor is told as ``name: block`` or ``name: shape:stride / block``, then ``by (1,0)`` to take the modes of its
    grid in another order, and ``follows`` where it has no say.  Raises SpecError for a tensor named twice.

    >>> from s3lab import parse
    >>> pair = parse("down: (M,1) & up: (1,K) follows keep 50%").bind({"down": (2, 4), "up": (4, 3)})
    >>> pair.S, pair.B, pair.E, pair.density, pair.leaders
    (1, 4, 5, 0.5, ('down',))
    """

    groups: tuple[Group, ...]
    keep: Keep

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        object.__setattr__(self, "keep", Scope((ONE,), keep=self.keep).keep)
        names = self.names
        for name in names:
            if names.count(name) > 1:
                twice = [member.told_grid for group in self.groups for member in group.members if member.name == name]
                raise SpecError(f"{name} is coupled with itself, as {' and as '.join(twice)}: name each tensor once")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the tensors, in order."""
        return tuple(member.name for group in self.groups for member in group.members)

    @property
    def followers(self) -> frozenset[str]:
        """The names of the tensors that have no say in which blocks go."""
        return frozenset(member.name for group in self.groups for member in group.members if member.follows)

    def bind(self, shape: Mapping[str, Shape]) -> CoupledPartition:
        """Return the canonical form on tensors of these shapes (M, K) by name.

        Raises SpecError for a name that is missing or unknown, for grids or numbers of scopes that do not match.
        """
        if not isinstance(shape, Mapping):
            raise SpecError(f"{self} couples tensors: bind it to their shapes by name, not to {shape}")
        if wrong := set(shape) ^ set(self.names):
            raise SpecError(
                f"{', '.join(sorted(map(str, wrong)))} is on one side only: coupled are "
                f"{'; '.join(m.told_grid for g in self.groups for m in g.members)}; given are the tensors "
                f"{', '.join(f'{name} {extents}' for name, extents in shape.items())}"
            )
        return _bind_coupled(self, tuple((name, check_shape(shape[name], name)) for name in self.names))

    def rename(self, names: Mapping[str, str]) -> Coupled:
        """Return the coupling of the tensors of other names, each given by its old one.

        >>> from s3lab import parse
        >>> str(parse("q: (1,1) | k: (1,1) keep 50%").rename({"q": "q_proj", "k": "k_proj"}))
        'q_proj: (1,1) | k_proj: (1,1) keep 50%'
        """
        groups = (
            replace(group, members=tuple(replace(member, name=names[member.name]) for member in group.members))
            for group in self.groups
        )
        return Coupled(tuple(groups), self.keep)

    def check(self, mask: Mapping[str, Tensor]) -> None:
        """Raise SpecError, naming the first scope at fault, unless the masks by name keep what this asks for."""
        self.bind({name: (m.shape[0], m.shape[1]) for name, m in mask.items()}).check(mask)

    def __str__(self) -> str:
        return f"{' | '.join(str(group) for group in self.groups)} keep {write_keep(self.keep)}"


@lru_cache(maxsize=256)
def _bind_coupled(spec: Coupled, shapes: tuple[tuple[str, Shape], ...]) -> CoupledPartition:
    by_name = dict(shapes)
    bound = [group.bind(by_name) for group in spec.groups]
    first, S = spec.groups[0], next(iter(bound[0].values()))[0].size
    for group, layouts in zip(spec.groups, bound, strict=True):
        scopes = next(iter(layouts.values()))[0]
        if scopes.size != S:
            raise SpecError(
                f"the scopes of {first} and {group} do not match: grids of {_extents(next(iter(bound[0].values()))[0])}"
                f" and {_extents(scopes)} scopes; scopes that share a budget must be as many"
            )
    blocks = sum(next(iter(layouts.values()))[1].size for layouts in bound)
    keep = Scope((Size.of(blocks),), keep=spec.keep).count(blocks)
    groups = tuple(
        tuple((name, Partition(f"{spec} ({name})", by_name[name], layout, 1)) for name, layout in layouts.items())
        for layouts in bound
    )
    return CoupledPartition(str(spec), groups, spec.followers, keep)


def _extents(grid: Layout) -> tuple[int, ...]:
    return tuple(mode.size for mode in grid)


def _proper(extents: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in extents if n > 1)
