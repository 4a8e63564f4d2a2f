"""What a piece of work costs: wall time, peak memory above what was in use when it began; and which dtype is fast."""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from types import TracebackType

import torch

_MIB = 2**20


class Meter:
    """Context manager that measures ``time_s`` and ``mem_mib`` of the work inside, on one device.

    On CUDA the memory is that of torch's allocator.  On a CPU it is the resident set's high-water mark, which Linux
    lets a process reset; elsewhere ``mem_mib`` is None.

    >>> with Meter("cpu") as meter:
    ...     total = sum(range(10))
    >>> meter.time_s >= 0
    True
    """

    time_s: float = float("nan")
    mem_mib: float | None = None
    _base: int | None = None

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)

    def __enter__(self) -> Meter:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)
        else:
            self._base = _reset_resident_peak()
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.time_s = time.perf_counter() - self._start
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident("VmHWM")
        if self._base is not None and peak is not None:
            self.mem_mib = max(0.0, (peak - self._base) / _MIB)


def _reset_resident_peak() -> int | None:
    """Set the high-water mark to what is resident now and return that, in bytes; None where it cannot be set."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device; 4 GiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 4 * 2**30
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def fast_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """Return the dtype to take products of such weights in: of half precision float32, on a CPU where it is faster.

    A CPU without instructions for half precision takes some nine times as long for it.  Which it is, is measured once.

    >>> fast_dtype(torch.float64, "cpu"), fast_dtype(torch.bfloat16, "cuda")
    (torch.float64, torch.bfloat16)
    """
    half = dtype in (torch.bfloat16, torch.float16) and torch.device(device).type == "cpu"
    return torch.float32 if half and _time_product(dtype) > 1.5 * _time_product(torch.float32) else dtype


@cache
def _time_product(dtype: torch.dtype) -> float:
    """The shortest of some times of a product on the CPU, in seconds."""
    x, w = (torch.ones(n, 1024, dtype=dtype, device="cpu") for n in (64, 512))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        torch.nn.functional.linear(x, w)
        times.append(time.perf_counter() - start)
    return min(times)
