"""A decoder layer passed stage by stage: what a stage leaves is laid aside, so that no product is taken twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from s3lab.models.prune.chunks import Chunk
from s3lab.models.prune.flow import Flow, Reached, See, Shelf
from s3lab.models.structure.decoder import OUTPUT, Course, Matrix, Shapes, Stage

_GIVEN = ""  # the input of a product, as the layer computes it


@dataclass(frozen=True)
class Step:
    """A pass through a layer as far as the inputs of a stage, or to its end, where the stage has no groups.

    ``wanted`` names the products that it needs, each with the name of what was laid aside for it, if anything was;
    ``kept`` is what it lays aside, and ``done`` what nothing needs after it.
    """

    stage: Stage
    wanted: Mapping[str, str]
    kept: frozenset[str]
    done: frozenset[str]


class Passage:
    """The pruned stream on its way through layer ``index``, which is pruned stage by stage meanwhile.

    Where each matrix is final once its own stage is pruned, a pass begins with what those before it have laid aside:
    products that are not needed, and what else is computed from them, are no more than shapes.  A layer that cannot
    be passed so (experts, matrices that are pruned after their stage, one product that switches another) is passed from
    its beginning to each stage.  Which of the two it is, a trial with the first sequence shows.

    ``stages`` are those to be watched, in order; ``final`` names the matrices that are final with their stage.
    """

    def __init__(self, flow: Flow, index: int, course: Course, stages: Sequence[Stage], final: Iterable[str]) -> None:
        self.flow, self.index, self.stages = flow, index, stages
        self.matrices = flow.decoder.matrices[index]
        orderly = all(stage.once for stage in course.stages) and set(final) >= self.matrices.keys()
        self.steps = plan_steps(course, stages) if orderly else []
        if not self._try():
            self.steps = []

    def watch(self, number: int, see: See) -> None:
        """Tell ``see(matrix, input, chunk)`` of every input of a stage, by the first matrix of each group."""
        stage = self.stages[number]
        if not self.steps:
            leaders = {group[0].name: group[0] for group in stage.groups}
            return self.flow.watch(self.index, "pruned", leaders, see, len(leaders) if stage.once else None)
        for chunk in self.flow.own:
            with suppress(Reached):
                self._pass(self.steps[number], chunk, self._begin(chunk), self.flow.shelf(self.index, chunk), see)

    def leave(self, chunk: Chunk) -> Tensor:
        """Return what the layer, all of it pruned, makes of a chunk."""
        if not self.steps:
            return self.flow.run(self.index, chunk, self._begin(chunk))
        return self._pass(self.steps[-1], chunk, self._begin(chunk), self.flow.shelf(self.index, chunk))

    def _begin(self, chunk: Chunk) -> Tensor:
        return self.flow.get(self.index, "pruned", chunk)

    def _pass(
        self,
        step: Step,
        chunk: Chunk,
        hidden: Tensor,
        shelf: Shelf | dict[str, Tensor],
        see: See = lambda matrix, x, chunk: None,
    ) -> Tensor:
        """Pass a layer and return its output; Reached, where the step ends before it."""
        missing = {group[0].name for group in step.stage.groups}

        def take(matrix: Matrix, x: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
            if matrix.name in missing:
                missing.remove(matrix.name)
                see(matrix, x, chunk)
                if (name := f"input of {matrix.name}") in step.kept:
                    shelf[name] = x
                if not missing:
                    raise Reached
            source = step.wanted.get(matrix.name)
            if source is None:
                return multiply(x.to("meta"))
            if source == (own := f"output of {matrix.name}"):
                return shelf[own]
            out = multiply(x if source == _GIVEN else shelf[source])
            if own in step.kept:
                shelf[own] = out
            return out

        try:
            with Shapes(self.matrices, take):
                return self.flow.run(self.index, chunk, hidden)
        finally:
            for name in step.done:
                del shelf[name]

    def _try(self) -> bool:
        """Whether the layer, passed step by step, makes of the first sequence what it makes of it at once."""
        chunk, hidden = self.flow.sample(self.index)
        shelf: dict[str, Tensor] = {}
        try:
            for step in self.steps[:-1]:
                with suppress(Reached):
                    self._pass(step, chunk, hidden.clone(), shelf)
            for step in self.steps[-1:]:
                out = self._pass(step, chunk, hidden.clone(), shelf)
                torch.testing.assert_close(out, self.flow.run(self.index, chunk, hidden))
        except (RuntimeError, NotImplementedError, KeyError, AssertionError):
            return False
        return True


def plan_steps(course: Course, stages: Sequence[Stage]) -> list[Step]:
    """Return the passes through a layer: as far as the inputs of each stage, then to its end.

    A product is taken in the first pass that needs it, from its input as laid aside when its stage was watched, or, of
    a matrix that is not watched or has no source, as the layer computes it; its output is laid aside until the last.
    """
    leader_of = {m.name: group[0].name for stage in stages for group in stage.groups for m in group}
    targets = [{m.name for group in stage.groups for m in group} for stage in stages] + [{OUTPUT}]
    seen: set[str] = set()
    taken: set[str] = set()
    wanted: list[dict[str, str]] = []
    for target in targets:
        found: dict[str, str] = {}
        queue = [source for name in target for source in course.sources.get(name, ())]
        while queue:
            name = queue.pop()
            if name in found:
                continue
            if name in taken:
                found[name] = f"output of {name}"
            elif name in seen and course.sources[name]:
                found[name] = f"input of {leader_of[name]}"
            else:
                found[name] = _GIVEN
                queue += course.sources[name]
        wanted.append(found)
        taken |= found.keys()
        seen |= target
    last = {name: number for number, found in enumerate(wanted) for name in found.values() if name != _GIVEN}
    return [
        Step(stage, found, frozenset(last), frozenset(name for name, end in last.items() if end == number))
        for number, (stage, found) in enumerate(zip((*stages, Stage((), once=True)), wanted, strict=True))
    ]
