"""Run jobs in the order of dependence, several at a time, here or on a Dask cluster, with a progress bar."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from s3lab.errors import DataError
from s3lab.lab.run.fresh import own_records
from s3lab.lab.run.job import Job, Outcome, executed, run
from s3lab.lab.run.notebook import count_cells, count_done, read_parameters

if TYPE_CHECKING:
    from distributed import Client

_TICK_S = 0.3
_PATIENCE_S = 10
_CELL_S = 5.0  # a cell, where no record says better
_NEARLY = 0.95  # of a job that takes longer than it is expected to
_BAR = "{desc}{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left"


def run_all(
    jobs: Sequence[Job],
    out: Path,
    workers: int = 1,
    dask: str | None = None,
    force: bool = False,
    progress: TextIO | None = None,
) -> list[Outcome]:
    """Run jobs, each when those it needs have ended well, and return their outcomes in the order given.

    ``workers`` jobs run at a time, each with its share of the cores, or as many as the Dask scheduler at the address
    ``dask`` has threads; its workers see the same files.  One failure stops only those that need it.  An interrupt
    stops all jobs under way here, and is raised again when they have ended.  Raises DataError where jobs need each
    other, or no scheduler answers.
    """
    sorter = TopologicalSorter({job.name: job.needs for job in jobs})
    try:
        sorter.prepare()
    except CycleError as error:
        raise DataError(f"these notebooks read each other's tables: {', '.join(error.args[1])}") from None
    by_name = {job.name: job for job in jobs}
    outcomes: dict[str, Outcome] = {}
    running: dict[Future[Outcome], Job] = {}
    with _executor(workers, dask) as (executor, settings), _Bar(jobs, out, progress) as bar:
        while sorter.is_active():
            for name in sorter.get_ready():
                job = by_name[name]
                if failed := next((need for need in job.needs if outcomes[need].error), None):
                    outcomes[name] = Outcome(job, (), 0.0, f"not run: it reads the tables of {failed}, which failed")
                    sorter.done(name)
                else:
                    running[executor.submit(run, job, out, force=force, **settings)] = job
            ended, _ = wait(running, timeout=_TICK_S, return_when=FIRST_COMPLETED)
            for future in ended:
                job, broken = running.pop(future), future.exception()
                lost = f"{type(broken).__name__}: {broken}"  # a full disk, or a worker that is gone
                outcomes[job.name] = Outcome(job, (), 0.0, lost) if broken else future.result()
                sorter.done(job.name)
            bar.show(running.values(), outcomes)
    return [outcomes[job.name] for job in jobs]


@contextmanager
def _executor(workers: int, dask: str | None) -> Iterator[tuple[Executor, dict[str, Any]]]:
    """Yield what runs the jobs, and what they are told beside what to do; on the way out stop those under way."""
    # Threads that spin while they wait slow each other down a hundredfold on a machine that is shared.
    variables = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    if dask is not None:
        with _connect(dask) as client:
            yield client.get_executor(pure=False), {"variables": variables}
        return
    if workers > 1:
        share = max(1, len(os.sched_getaffinity(0)) // workers)
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(share))
    stop = Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield pool, {"variables": variables, "stop": stop}
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _connect(address: str) -> Client:
    from distributed import Client

    try:
        return Client(address, timeout=_PATIENCE_S)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no Dask scheduler answers at {address!r} ({error}): start one with `dask scheduler` and `dask worker`, "
            "and give the address that it prints"
        ) from None


class _Bar:
    """A bar over the seconds that the jobs take, with the time that is left, and the notebook under way.

    A job is expected to take as long as the records in its folder say that it took, or as its cells do elsewhere.
    """

    def __init__(self, jobs: Sequence[Job], out: Path, file: TextIO | None) -> None:
        self.out, self.began = out, time.time()
        self.cells = {job.name: count_cells(job.notebook) for job in jobs}
        known = {job.name: seconds for job in jobs if (seconds := _recall_time(job, out))}
        a_cell = sum(known.values()) / sum(self.cells[name] for name in known) if known else _CELL_S
        self.seconds = {name: known.get(name, a_cell * cells) for name, cells in self.cells.items()}
        self.started: dict[str, float] = {}
        self.done: dict[str, float] = {}
        self.bar = tqdm(total=round(sum(self.seconds.values())), unit="s", file=file, bar_format=_BAR)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, running: Iterable[Job], ended: Iterable[str]) -> None:
        """Draw the bar: all of the jobs that have ended, and of those under way what their time and cells say."""
        begun = []
        for job in running:
            cells = count_done(executed(job, self.out), self.began)
            if cells is not None:
                begun.append(f"{job.name} {cells}/{self.cells[job.name]}")
                since = time.time() - self.started.setdefault(job.name, time.time())
                share = max(cells / self.cells[job.name], min(since / self.seconds[job.name], _NEARLY))
                self.done[job.name] = max(share * self.seconds[job.name], self.done.get(job.name, 0.0))
        self.done |= {name: self.seconds[name] for name in ended}
        others = f" and {len(begun) - 1} more" if len(begun) > 1 else ""
        self.bar.set_description("".join(begun[:1]) + others, refresh=False)
        self.bar.update(round(sum(self.done.values())) - self.bar.n)


def _recall_time(job: Job, out: Path) -> float | None:
    """How long a job took when the records in its folder were made, None where there are none."""
    full = read_parameters(job.notebook) | job.parameters
    records = own_records(job.notebook, full, out / job.point)
    return max((json.loads(path.read_text()).get("time_s", 0.0) for path in records), default=None)
