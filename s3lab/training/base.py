"""What every training method is: a frozen set of options that says how the weights of a pattern are seen and moved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from s3lab.algebra.compose import Bound
from s3lab.algebra.coupled import CoupledPartition
from s3lab.algebra.partition import Partition
from s3lab.algebra.spec import Block, Pattern, Scope, Spec, View
from s3lab.errors import SolveError, SpecError
from s3lab.solvers.kernels import project

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Method(ABC):
    """A way to train under a pattern, with its options; its repr is its provenance.  Subclasses write `weigh`.

    One object serves all layers: what belongs to a layer is in its `SparseWeight`.  Raises SolveError for options that
    cannot be.

    >>> from s3lab import SRSTE
    >>> isinstance(SRSTE(decay=1e-4), Method)
    True
    """

    needs_gradient: ClassVar[bool] = True  # refuses a frozen layer
    freezes: ClassVar[bool] = False  # trains tensors of its own, and not the weight
    prepares: ClassVar[bool] = False  # changes gradients before the optimiser sees them
    prunes: ClassVar[bool] = True  # what is outside the mask is zero, and not merely left as it is

    @abstractmethod
    def weigh(self, W: Tensor, own: SparseWeight) -> Tensor:
        """Return the weight (M, K) that the forward pass sees; autograd goes through it."""

    def begin(self, unit: Unit, generator: torch.Generator) -> Tensors:
        """Return the first masks by name: those of the largest blocks."""
        return unit.project(unit.squares())

    def equip(self, own: SparseWeight, W: Tensor, generator: torch.Generator) -> None:
        """Give a weight the parameters that it needs beside its mask: none."""
        return

    def prepare(self, unit: Unit) -> None:
        """Change the gradients before the optimiser's step: not at all."""
        return

    def step(self, unit: Unit, optimizer: torch.optim.Optimizer | None) -> None:
        """Change masks and weights after the optimiser's step: not at all.  ``unit.steps`` counts this step."""
        return

    def bound(self, unit: Unit) -> Bound:
        """Return the pattern that the masks satisfy now, on `Unit.grid`."""
        return unit.grid


@dataclass(frozen=True)
class LowRank(Method):
    """A method that freezes the weight, and trains numbers of a low ``rank`` that it takes in by ``scale``.

    Raises SolveError for a rank or a scale that cannot be.
    """

    rank: int = 16
    scale: float = 1.0
    needs_gradient: ClassVar[bool] = False
    freezes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.scale < inf:
            raise SolveError(f"{self}: rank is at least 1, scale above 0 and finite")


class SparseWeight(nn.Module):
    """The parametrisation of one weight: a method, the mask (M, K), True = kept, and how many steps were taken.

    The mask and parameters of the method are part of the model's state, and the steps its extra state: what
    ``state_dict`` saves goes on where it was.
    """

    mask: Tensor

    def __init__(self, method: Method, mask: Tensor, trained: bool) -> None:
        super().__init__()
        self.method = method
        self.trained = trained  # whether the weight took gradients before
        self.steps = 0
        self.register_buffer("mask", mask)

    def forward(self, W: Tensor) -> Tensor:
        """Return the weight that the layer computes with."""
        return self.method.weigh(W, self)

    def get_extra_state(self) -> Tensor:
        """Return the number of steps, as state_dict saves it."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Take up the number of steps from a state_dict."""
        self.steps = int(state)


@dataclass(eq=False)
class Unit:
    """A pattern and the linear layers that it decides on, by dotted name: one, or those that a coupling names.

    Methods see one matrix of scores, the `grid`: the weight (M, K) itself, or one number for each block (S, B) of a
    coupling.  `gather` leads there and `spread` back.  ``sparse`` are the parametrisations of the layers, once they
    have them.  Raises SpecError where the pattern does not fit, naming the layers.
    """

    spec: Pattern
    layers: dict[str, nn.Linear]
    sparse: dict[str, SparseWeight] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in self.layers.items()}
        try:
            self.whole: Bound | CoupledPartition = self.spec.bind(shapes if self.spec.names else self._one(shapes))
        except SpecError as error:
            raise SpecError(f"{', '.join(self.layers)}: {error}") from error

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The weights (M, K) that the layers were given, dense."""
        return {
            name: layer.parametrizations["weight"].original if is_parametrized(layer, "weight") else layer.weight  # pyright: ignore
            for name, layer in self.layers.items()
        }

    @property
    def is_sparse(self) -> bool:
        """Whether the layers are sparse now: they were made so, and not dense since."""
        return bool(self.sparse) and all(is_parametrized(layer, "weight") for layer in self.layers.values())

    @property
    def masks(self) -> Tensors:
        """The masks of the layers."""
        return {name: own.mask for name, own in self.sparse.items()}

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return next(iter(self.sparse.values())).steps

    @cached_property
    def grid(self) -> Bound:
        """The pattern on the matrix of scores."""
        if not isinstance(self.whole, CoupledPartition):
            return self.whole
        rows = Spec(View(), Block((1, 1)), Scope((1, "K"), keep=self.whole.keep))  # pyright: ignore[reportArgumentType]
        return rows.bind((self.whole.S, self.whole.B))

    def gather(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Return scores (M, K) by name on the grid: of a coupling, their sums over the leaders of each block."""
        return self.whole.cost(scores) if isinstance(self.whole, CoupledPartition) else self._one(scores)

    def spread(self, mask: Tensor) -> Tensors:
        """Return a mask of the grid as masks (M, K) by name."""
        return self.whole.scatter(mask) if isinstance(self.whole, CoupledPartition) else {next(iter(self.layers)): mask}

    def project(self, scores: Mapping[str, Tensor], bound: Bound | None = None) -> Tensors:
        """Return the masks of the blocks with the highest scores, under another budget where ``bound`` has one."""
        grid, worth = bound or self.grid, self.gather(scores)
        return self.spread(project(grid, worth) if isinstance(grid, Partition) else grid.project(worth))

    def squares(self) -> Tensors:
        """Return the squared weights by name, at least in float32: their sums are squared block norms."""
        return {name: widen(W.detach()).square() for name, W in self.weights.items()}

    def put(self, masks: Mapping[str, Tensor]) -> None:
        """Give the layers other masks, in place."""
        for name, own in self.sparse.items():
            own.mask.copy_(masks[name])

    def check(self, masks: Mapping[str, Tensor], bound: Bound | None = None) -> None:
        """Raise SpecError, naming the layers, unless the masks satisfy the pattern."""
        bound = bound or self.grid
        try:
            if isinstance(self.whole, CoupledPartition):
                replace(self.whole, keep=bound.first_part.keep).check(masks)
            else:
                bound.check(self._one(masks))
        except SpecError as error:
            raise SpecError(f"{', '.join(self.layers)}: {error}") from error

    def _one(self, by_name: Mapping[str, Any]) -> Any:
        return by_name[next(iter(self.layers))]


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def cut_off(W: Tensor, mask: Tensor) -> Tensor:
    """Return W with zeros where the mask is False; their gradient is zero, too."""
    return torch.where(mask, W, 0)


def pass_through(W: Tensor, mask: Tensor) -> Tensor:
    """Return W with zeros where the mask is False; the gradient of W is that of the result, as if nothing were cut.

    >>> W = torch.ones(2, requires_grad=True)
    >>> pass_through(W, torch.tensor([True, False])).tolist()
    [1.0, 0.0]
    >>> pass_through(W, torch.tensor([True, False])).sum().backward()
    >>> W.grad
    tensor([1., 1.])
    """
    return torch.where(mask, W, W - W.detach())
