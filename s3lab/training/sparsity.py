"""The layers of a module that are trained under patterns, and the steps that they take together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from s3lab.errors import SolveError, SpecError
from s3lab.training.base import Method, Unit

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(eq=False)
class Sparsity:
    """What `sparse` returns: it takes a step with each step of the optimiser.

    After ``follow(optimizer)`` that happens by itself.  In a loop of one's own, ``prepare()`` comes between
    ``loss.backward()`` and ``optimizer.step()``, for the methods that change gradients, and ``step()`` after it.
    ``callback()`` is for the Trainer of transformers.  Raises SolveError for a step that was not prepared.

    Steps, masks and what a method trains are in the state of the module: load it, and the optimiser's, and go on.
    Layers that `densify` made dense take no more steps, and ``masks`` and ``steps`` stay as they were.

    >>> import s3lab as s3
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    >>> sparsity = s3.sparse(model, "2:4", s3.SRSTE())
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> sparsity.follow(optimizer)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(16, 8)).square().mean().backward()
    ...     optimizer.step()
    >>> sparsity.check()
    >>> sparsity
    Sparsity(SRSTE(decay=0.0002), 2 layers, 3 steps)
    """

    method: Method
    units: list[Unit]
    _prepared: bool = field(default=False, init=False)

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return self.units[0].steps

    @property
    def masks(self) -> dict[str, Tensor]:
        """The masks (M, K), True = kept, by the dotted name of the layer."""
        return {name: mask for unit in self.units for name, mask in unit.masks.items()}

    @torch.no_grad()
    def prepare(self) -> None:
        """Change the gradients as the method asks, before the optimiser's step; once a step, however often called."""
        if not self._prepared:
            for unit in self._active():
                self.method.prepare(unit)
        self._prepared = True

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Update masks and weights after the optimiser's step; some methods must see the optimiser."""
        if self.method.prepares and not self._prepared:
            raise SolveError(
                f"{self.method} changes gradients before the optimiser's step: call prepare() there, or "
                "follow(optimizer) once, before the training"
            )
        self._prepared = False
        for unit in self._active():
            for own in unit.sparse.values():
                own.steps += 1
            self.method.step(unit, optimizer)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepare and take each step of an optimiser from now on."""
        optimizer.register_step_pre_hook(lambda *_: self.prepare())
        optimizer.register_step_post_hook(lambda stepped, *_: self.step(stepped))

    def callback(self) -> TrainerCallback:
        """Return what has the Trainer of transformers prepare and take the steps."""
        from transformers import TrainerCallback

        sparsity = self

        class Steps(TrainerCallback):
            def on_pre_optimizer_step(self, *args: Any, **given: Any) -> None:
                sparsity.prepare()

            def on_optimizer_step(self, *args: Any, **given: Any) -> None:
                sparsity.step(given.get("optimizer"))

        return Steps()

    def check(self) -> None:
        """Raise SpecError, naming the layer, unless all masks are lawful now, and all weights follow them."""
        for unit in self._active():
            unit.check(unit.masks, self.method.bound(unit))
            for name, layer in unit.layers.items():
                rest = layer.weight if self.method.prunes else layer.weight - unit.weights[name]
                if bool(rest.masked_fill(unit.masks[name], 0).any()):
                    raise SpecError(
                        f"{name}: a weight outside the mask is {'not zero' if self.method.prunes else 'moved'}"
                    )

    def _active(self) -> list[Unit]:
        return [unit for unit in self.units if unit.is_sparse]

    def __repr__(self) -> str:
        return f"Sparsity({self.method}, {len(self.masks)} layers, {self.steps} steps)"
