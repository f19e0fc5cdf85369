"""What a call costs on a device: time, memory, and how that compares with what the device can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Calls = Mapping[str, Callable[[], object]]

CACHE_BYTES = 1 << 28
"""Written before each measurement on a GPU: more than any L2 cache holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What one call costs."""

    milliseconds: float
    """The lower quartile of the repetitions."""
    mib: float | None
    """Device memory at its peak beyond what was held before, MiB; None on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a report."""

    case: str
    what: str
    """`forward`, `backward` or `both`."""
    rival: str
    timing: Timing | None
    """None when it could not run; `note` says why."""
    work: float | None = None
    """What the result needs, whatever the implementation does besides."""
    unit: Literal["TFLOP", "TB"] = "TFLOP"
    """Of `work`: arithmetic, or bytes read and written."""
    note: str = ""

    @property
    def rate(self) -> float | None:
        """`unit` per second."""
        if self.timing is None or self.work is None:
            return None
        return 1e3 * self.work / self.timing.milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device reaches in plain work, measured in the same run."""

    device: str
    matmul: float
    """TFLOP/s of a large square product in the dtype of the benchmark."""
    copy: float
    """TB/s read and written by a copy."""


def ceilings(device: torch.device, dtype: torch.dtype, repeat: int) -> Ceilings:
    """Measure them."""
    size, count = (8192, 1 << 30) if device.type == "cuda" else (512, 1 << 23)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = in_turns({"matmul": lambda: left @ right, "copy": lambda: target.copy_(source)}, device, repeat)
    return Ceilings(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        matmul=2e-9 * size**3 / times["matmul"].milliseconds,
        copy=2e-9 * count / times["copy"].milliseconds,
    )


def in_turns(calls: Calls, device: torch.device, repeat: int) -> dict[str, Timing]:
    """Costs of every call; they take turns, so that noise meets them alike."""
    clock = _gpu if device.type == "cuda" else _cpu
    times: dict[str, list[float]] = {name: [] for name in calls}
    memory = {name: _memory(call, device) for name, call in calls.items()}  # warms up too
    for _ in range(repeat):
        for name, call in calls.items():
            times[name].append(clock(call, device))
    return {
        name: Timing(milliseconds=sorted(values)[len(values) // 4], mib=memory[name]) for name, values in times.items()
    }


def _memory(call: Callable[[], object], device: torch.device) -> float | None:
    if device.type != "cuda":
        call()
        return None
    call()  # compiles and tunes, which may allocate
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _gpu(call: Callable[[], object], device: torch.device) -> float:
    torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device).zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _cpu(call: Callable[[], object], _: torch.device) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)
