"""What is measured of the inputs of a decoder layer's matrices: their second moments, and whose they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from s3lab.errors import S3Error
from s3lab.models.prune.chunks import Chunk
from s3lab.models.prune.flow import Flow
from s3lab.models.structure.decoder import Course, Matrix, Stage, find_course
from s3lab.tensors.hessian import Moment


@dataclass(frozen=True)
class Measured:
    """What is known of an input: its second moments, its tokens, and whether these are all there are.

    ``outputs`` says how much each output of the matrix that takes it counts, where the loss has been asked.
    """

    H: Tensor | None
    H_test: Tensor | None
    tokens: int
    all_tokens: bool
    outputs: Tensor | None = None


class Moments:
    """The second moments of the inputs of stages' groups, of the calibration and of the held-out sequences."""

    def __init__(self, flow: Flow, stages: Sequence[Stage]) -> None:
        self.flow = flow
        self.leaders = {group[0].name: group[0] for stage in stages for group in stage.groups}
        self._moments = {name: (Moment(), Moment()) for name in self.leaders}

    def see(self, matrix: Matrix, x: Tensor, chunk: Chunk) -> None:
        """Add inputs of a group, told by the first of its matrices, each as much as the loss hangs on its token."""
        with naming(matrix.name):
            fisher = self.flow.fisher
            self._moments[matrix.name][chunk.held_out].add(fisher.weigh(matrix, x, chunk) if fisher else x)

    def pool(self) -> list[Measured]:
        """Return what all processes together know of each group's input."""
        found, fisher = [], self.flow.fisher
        for name, moments in self._moments.items():
            for moment in moments:
                moment.pool(self.flow.processes, self.flow.device)
            H, H_test = (moment.value() if moment.tokens else None for moment in moments)
            tokens, outputs = moments[0].tokens, None
            if fisher and tokens:
                outputs = fisher.outputs[name].to(self.flow.device)
            found.append(Measured(H, H_test, tokens, tokens >= self.flow.tokens, outputs))
        return found


def measure_layer(flow: Flow, index: int) -> dict[tuple[str, ...], Measured]:
    """Send the dense stream through layer ``index`` and return what is known of each input in it.

    Inputs go by the names of the matrices that share them.  The layer is dense and on the device of the flow.
    """
    groups = [group for stage in find_own_course(flow, index).stages for group in stage.groups]
    moments = Moments(flow, (Stage(tuple(groups), once=False),))
    flow.advance_dense(index, moments.leaders, moments.see)
    return {tuple(matrix.name for matrix in group): found for group, found in zip(groups, moments.pool(), strict=True)}


def find_own_course(flow: Flow, index: int) -> Course:
    """The way through a layer, as the first sequence takes it.

    Where each matrix weighs the tokens of its input in its own way, none shares it.
    """
    chunk, hidden = flow.sample(index)
    hidden = hidden.requires_grad_()
    # a layer may write into what it is given, which a leaf forbids
    course = find_course(
        flow.decoder.matrices[index], lambda: flow.run(index, chunk, hidden.clone()), chunk.ids.numel()
    )
    if not flow.fisher:
        return course
    alone = [tuple((matrix,) for group in stage.groups for matrix in group) for stage in course.stages]
    stages = (Stage(groups, stage.once) for groups, stage in zip(alone, course.stages, strict=True))
    return Course(tuple(stages), course.sources)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put the name of a matrix before what is wrong with it."""
    try:
        yield
    except S3Error as error:
        raise type(error)(f"{name}: {error}") from error
