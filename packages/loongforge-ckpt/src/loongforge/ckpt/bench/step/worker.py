"""A side's process: it imports once, then measures one case after the other, each when it is its turn."""

from __future__ import annotations

import gc
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from loongforge.ckpt.bench.step.case import Case, Facts, Kernel, Profiled, Result, Unable, batch_of

if TYPE_CHECKING:
    import torch

Step = Callable[[Mapping[str, Any], int], tuple[Any, Any]]
"""`step(batch, number)`: loss and gradient norm, numbers or tensors that nobody has waited for yet."""

SIDES: Mapping[str, tuple[str, str]] = {
    "ours": ("ours", "plain"),
    "ours-te": ("ours", "engine"),
    "transformers": ("theirs", "halved"),
    "transformers-autocast": ("theirs", "autocast"),
    "megatron": ("upstream", "defaults"),
}
"""Name to module of this package, which has `prepare`, and what builds the step there."""

PACKAGES = ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "liger-kernel", "flash-attn")
PROFILED_STEPS = 2


def serve(pipe: Connection, side: str, threads: int | None) -> None:
    """Answer cases with results until None comes, the words "product" with TFLOP/s; first say what is here."""
    import torch

    from loongforge.core.platform import choose

    warnings.simplefilter("ignore")  # what libraries say of each other; what a side chose stands in its result
    if threads:
        torch.set_num_threads(threads)
    module = import_module(f"{__package__}.{SIDES[side][0]}")
    try:
        module.prepare()
    except ImportError as error:
        pipe.send(Facts(device="", missing=f"needs {error.name}, which is not installed"))
        return
    device = choose().platform().device(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    pipe.send(Facts(device=name, versions=_versions()))
    while (asked := pipe.recv()) is not None:
        if isinstance(asked, tuple):
            pipe.send(_product(device, *asked))
        else:
            pipe.send(answer(asked, side, getattr(module, SIDES[side][1]), device))


def answer(case: Case, side: str, build: Any, device: torch.device) -> Result:
    """One case, and the device given back afterwards."""
    result = _attempt(case, side, build, device)
    # Only here are the frames of an error gone, and with them what they held.
    gc.collect()
    if device.type != "cuda":
        return result
    import torch

    torch.cuda.empty_cache()
    return replace(result, left_bytes=torch.cuda.memory_allocated(device))


def _attempt(
    case: Case, side: str, build: Callable[[Case], AbstractContextManager[tuple[Step, str]]], device: torch.device
) -> Result:
    import torch

    empty = Result(side=side, case=case.label)
    try:
        with build(case) as (step, about):
            return replace(_measure(case, step, device), side=side, about=about)
    except Unable as reason:
        return replace(empty, reason=str(reason))
    except torch.OutOfMemoryError as error:
        return replace(empty, reason=f"out of memory: {str(error).partition('. GPU')[0]}")
    except Exception as error:  # noqa: BLE001  whatever ends a side must not end the others
        return replace(empty, reason=f"{type(error).__name__}: {' '.join(str(error).split())}", failed=True)


def _measure(case: Case, step: Step, device: torch.device) -> Result:
    """The gate's steps, then two timed stretches, then the profiler."""
    import torch

    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    losses, norms = [], []
    for number in range(case.gate_steps):
        loss, norm = step(batch_of(case, number), number)
        losses.append(float(loss))
        norms.append(float(norm))
    first, seconds = case.gate_steps, []
    for _ in range(2):
        batches = [batch_of(case, number) for number in range(first, first + case.steps)]
        began = _now(device)
        for number, batch in enumerate(batches, first):
            step(batch, number)
        seconds.append((_now(device) - began) / case.steps)
        first += case.steps
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else None
    return Result(
        side="", case=case.label, losses=tuple(losses), norm=norms[0], seconds=tuple(seconds), peak_bytes=peak,
        profiled=_profile(case, step, first, on_gpu=on_gpu) if case.profile else None,
    )  # fmt: skip


def _now(device: torch.device) -> float:
    """A clock that has waited for the device."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def _profile(case: Case, step: Step, first: int, *, on_gpu: bool) -> Profiled:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    batches = [batch_of(case, number) for number in range(first, first + PROFILED_STEPS)]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as seen:  # torch 2.11 warns that it keeps no others
        for number, batch in enumerate(batches, first):
            step(batch, number)
        _now_of(on_gpu)
    calls: Counter[str] = Counter()
    spent: defaultdict[str, float] = defaultdict(float)
    launches = 0
    for event in seen.events() or ():
        launches += event.name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset"))
        if on_gpu and event.device_type != DeviceType.CUDA:
            continue
        calls[event.name] += 1
        spent[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
    return Profiled(kernels=tuple(_kernels(calls, spent)), launches=launches / PROFILED_STEPS)


def _now_of(on_gpu: bool) -> None:
    if on_gpu:
        import torch

        torch.cuda.synchronize()


def _kernels(calls: Mapping[str, int], microseconds: Mapping[str, float]) -> Iterator[Kernel]:
    for name in sorted(microseconds, key=lambda one: -microseconds[one]):
        yield Kernel(
            name=name, calls=calls[name] / PROFILED_STEPS, milliseconds=1e-3 * microseconds[name] / PROFILED_STEPS
        )


def _product(device: torch.device, size: int, precision: str) -> float:
    """TFLOP/s of a square matrix product of random numbers, the lower quartile of its times."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times: list[float] = []
    for _ in range(13):
        began = _now(device)
        torch.mm(left, right)
        times.append(_now(device) - began)
    return 2e-12 * size**3 / sorted(times[3:])[2]


def optimizer_name(optimizer: Any) -> str:
    """A torch optimizer's package, class and whether it updates in one pass."""
    kind, fused = type(optimizer), "fused " if optimizer.defaults.get("fused") else ""
    return f"{fused}{kind.__name__} of {kind.__module__.partition('.')[0]}"


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "-"
    return found
