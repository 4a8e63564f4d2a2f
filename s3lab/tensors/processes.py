"""Processes that work on one thing together: what they tell each other, and what happens when one of them fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType

import torch
from torch import Tensor

from s3lab.errors import SolveError

_FINE, _SINGULAR, _LOST = 0.0, 1.0, 2.0  # how a process comes to a meeting


class ProcessGroup:
    """One process alone, for which all that a group does together is nothing: what it has is what all have.

    Every process of a group calls the same methods in the same order.

    >>> SOLO.rank, SOLO.size, SOLO.total(3), SOLO.sum(torch.ones(2)).tolist()
    (0, 1, 3, [1.0, 1.0])
    """

    rank = 0
    size = 1

    def wait(self) -> None:
        """Return when all processes are here."""

    def total(self, count: int) -> int:
        """Return the sum of what all processes count."""
        return count

    def max(self, value: float) -> float:
        """Return the largest value of any process."""
        return value

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of a tensor of one shape over all processes, with the same bits on each."""
        return x

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, one below the other; they may have different numbers of them."""
        return rows

    def first(self, x: Tensor) -> Tensor:
        """Return the tensor of the first process; the others give one of the same shape."""
        return x

    def united(self) -> AbstractContextManager[object]:
        """Return a context that all leave together, or none: where one process fails, no other waits for it.

        The others raise LinAlgError where it did, and SolveError that names it for anything else.
        """
        return nullcontext()


SOLO = ProcessGroup()


class Processes(ProcessGroup):
    """The processes of torch's default group: gloo on CPUs, NCCL on GPUs, or both.

    Before anything of size, all exchange two numbers: how each is doing, and how much it brings.  So an error inside
    `united` reaches the others at their next meeting.  A process that is killed cannot tell: gloo then fails at once,
    NCCL after its timeout, and torchrun ends them all.
    """

    def __init__(self) -> None:
        from torch import distributed

        self._group = distributed
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        on_gpu = "nccl" in distributed.get_backend()
        self._here = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._parted = False  # whether all know already that one has failed

    def wait(self) -> None:
        self._meet(0.0)

    def total(self, count: int) -> int:
        return int(sum(self._meet(float(count))))

    def max(self, value: float) -> float:
        return max(self._meet(value))

    def sum(self, x: Tensor) -> Tensor:
        self._agree(x)
        total = x.to(self._here, copy=True).contiguous()
        self._group.all_reduce(total)
        return total.to(x.device)

    def gather(self, rows: Tensor) -> Tensor:
        counts = [int(count) for count in self._meet(float(len(rows)))]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        sent = _as_bytes(padded).to(self._here)
        found = [torch.empty_like(sent) for _ in counts]
        self._group.all_gather(found, sent)
        parts = [part.to(rows.device).view(rows.dtype).view_as(padded) for part in found]
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def first(self, x: Tensor) -> Tensor:
        self._agree(x)
        sent = _as_bytes(x).to(self._here, copy=True)
        self._group.broadcast(sent, 0)
        return sent.to(x.device).view(x.dtype).view_as(x)

    def united(self) -> AbstractContextManager[object]:
        return _Union(self)

    def tell(self, error: BaseException | None) -> None:
        """Meet the others at the end of a union, with the error that it ended with, if they do not know of it."""
        if error is None:
            self.wait()
        elif not self._parted:
            singular = isinstance(error, torch.linalg.LinAlgError)  # pyright: ignore[reportPrivateImportUsage]
            self._meet(0.0, _SINGULAR if singular else _LOST)

    def begin(self) -> None:
        """Start afresh, as far as failures go."""
        self._parted = False

    def _agree(self, x: Tensor) -> None:
        if len(set(self._meet(float(x.numel())))) > 1:
            raise SolveError(f"process {self.rank} has a tensor {tuple(x.shape)} where another has one of another size")

    def _meet(self, value: float, doing: float = _FINE) -> list[float]:
        """Return the values of all; raise if another process does worse than this one."""
        own = torch.tensor([doing, value], dtype=torch.float64, device=self._here)
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._group.all_gather(found, own)
        states, values = torch.stack(found).T.tolist()
        self._parted, worst = any(states), states.index(max(states))
        if states[worst] > doing:
            if states[worst] == _SINGULAR:
                raise torch.linalg.LinAlgError(f"a factorisation failed in process {worst}")  # pyright: ignore[reportPrivateImportUsage]
            raise SolveError(f"process {worst} of {self.size} could not go on: its own error says why")
        return values


class _Union:
    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def __enter__(self) -> None:
        self._processes.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._processes.tell(error)


def find_processes(distributed: bool | ProcessGroup) -> ProcessGroup:
    """Return the group that a flag stands for: the processes of torch's default group, or this one alone.

    Raises SolveError where there is no such group.

    >>> find_processes(False) is SOLO
    True
    """
    if isinstance(distributed, ProcessGroup):
        return distributed
    if not distributed:
        return SOLO
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise SolveError(
            "distributed=True, and torch has no process group: start the script by torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    return Processes()


@contextmanager
def assemble(distributed: bool, device: str = "cpu") -> Iterator[tuple[ProcessGroup, str]]:
    """Start the process group that torchrun has prepared, for a device each; yield the group and the own device.

    Alone, where ``distributed`` is False.  Raises SolveError in a process that torchrun has not started.

    >>> with assemble(False) as (processes, device):
    ...     processes.size, device
    (1, 'cpu')
    """
    if not distributed:
        yield SOLO, device
        return
    if missing := {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise SolveError(
            f"{', '.join(sorted(missing))} are not set, as torchrun does: start with torchrun --nproc-per-node 2"
        )
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Processes(), f"cuda:{os.environ['LOCAL_RANK']}" if cuda else device
    finally:
        torch.distributed.destroy_process_group()


def _as_bytes(x: Tensor) -> Tensor:
    """The bits of a tensor, which travel whatever its dtype."""
    return x.detach().contiguous().reshape(-1).view(torch.uint8)
