"""Times of linear layers' products in BF16 and FP8 on this machine, quantisation included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

from loongforge.kernels.fp8.engine import EMULATED, TORCH, Engine, boundaries
from loongforge.kernels.fp8.report import Measurement, Refusal, Report
from loongforge.kernels.fp8.shape import GemmShape
from loongforge.kernels.testing import error_ratio

_SETS = 64
"""Most sets of inputs: a set so small that this many fit into the cache is measured from there."""
_ERROR = 0.08
"""error_ratio between FP8 and BF16 above which a product is wrong: 0.037 measured for every recipe and op; with the
scales of another row or block 0.2 and 0.9, since magnitudes of the inputs differ from square to square."""


@torch.no_grad()
def benchmark(
    shapes: Iterable[GemmShape],
    *,
    device: torch.device | str | None = None,
    micro_batches: int = 1,
    engine: Engine | None = None,
    repeat: int = 20,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Median times of every shape, by default on the GPU where there is one.

    BF16 is one product (grouped for groups). FP8 is quantisation of activations and gradients and the product; weights
    are quantised apart, and `micro_batches` share them. On a GPU sets of random inputs, twice its L2 cache together,
    take turns within a CUDA graph that is replayed `repeat` times. An FP8 result that is far from BF16's is a refusal
    with a reason, as is a shape that torch or the device cannot multiply. On a CPU the report is `emulated`, whatever
    the engine. `say` hears a line for each shape.

    Raises ValueError for a device other than a CPU or a GPU with FP8 (compute capability 8.9), and for counts below 1.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"benchmark: device is {device}, cpu or cuda is needed.")
    if micro_batches < 1 or repeat < 1:
        raise ValueError(f"benchmark: micro_batches is {micro_batches} and repeat {repeat}, 1 or more are needed.")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"benchmark: {name} has no FP8; a GPU of compute capability 8.9 or higher, or cpu, is needed.")
    engine = engine or (TORCH if device.type == "cuda" else EMULATED)
    measured: list[Measurement] = []
    refused: list[Refusal] = []
    for shape in dict.fromkeys(shapes):
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                measured.append(_measure(shape, engine, device, repeat))
            line = f"{measured[-1].speedup(micro_batches):.2f}x"
        except torch.AcceleratorError:
            raise  # the device is lost: what follows would be blamed for it
        except (RuntimeError, ValueError) as problem:
            refused.append(Refusal(shape=shape, reason=" ".join(str(problem).split())[:300]))
            line = f"refused: {refused[-1].reason}"
        if say:
            say(f"fp8: {shape.line()}: {line}")
    return Report(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        triton=_triton(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        engine=engine.name,
        emulated=engine.emulated or device.type == "cpu",
        micro_batches=micro_batches,
        measurements=tuple(measured),
        refusals=tuple(refused),
    )


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "not installed"


def _measure(shape: GemmShape, engine: Engine, device: torch.device, repeat: int) -> Measurement:
    if shape.m < shape.groups:
        raise ValueError(f"M {shape.m} leaves groups without rows, at least {shape.groups} are needed.")
    first = _inputs(shape, device, 0)
    size, beyond = sum(x.nbytes for x in first), 2 * _cache(device)
    sets = [first, *(_inputs(shape, device, seed) for seed in range(1, min(_SETS, -(-beyond // size))))]
    ends = torch.tensor(boundaries(shape)[1:], dtype=torch.int32, device=device)
    weighs = shape.op != "wgrad"
    rights = [engine.weights(shape, right) if weighs else right for _, right in sets]

    error = error_ratio(torch.cat(engine.step(shape, first[0], rights[0])), _bf16(shape, *first, ends).flatten(0, -2))
    if not error < _ERROR:
        raise ValueError(f"the result is wrong: {error:.2g} of its norm from BF16's, less than {_ERROR} is right.")

    def median(call: Callable[[int], object]) -> float:
        return (_gpu if device.type == "cuda" else _cpu)(call, len(sets), repeat)

    return Measurement(
        shape=shape,
        bf16_ms=median(lambda i: _bf16(shape, *sets[i], ends)),
        fp8_ms=median(lambda i: engine.step(shape, sets[i][0], rights[i])),
        weight_ms=median(lambda i: engine.weights(shape, sets[i][1])) if weighs else 0.0,
    )


def _inputs(shape: GemmShape, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """bf16 `[M, K or N]`, and the weight `[groups, N, K]`, or x `[M, K]` for wgrad."""
    generator = torch.Generator(device).manual_seed(seed)
    left = (shape.m, shape.k if shape.op == "fprop" else shape.n)
    right = (shape.m, shape.k) if shape.op == "wgrad" else (shape.groups * shape.n, shape.k)
    found = [_random(size, device, generator) for size in (left, right)]
    return found[0], found[1] if shape.op == "wgrad" else found[1].view(shape.groups, shape.n, shape.k)


def _random(size: tuple[int, int], device: torch.device, generator: torch.Generator) -> Tensor:
    """Normal numbers, each square of 128 with a magnitude of its own, from 1/4 to 4: a scale in a wrong place shows."""
    x = torch.randn(size, device=device, dtype=torch.bfloat16, generator=generator)
    squares = [-(-side // 128) for side in size]
    powers = torch.randint(-2, 3, squares, device=device, generator=generator).repeat_interleave(128, 0)[: size[0]]
    return x * torch.exp2(powers.repeat_interleave(128, 1)[:, : size[1]]).bfloat16()


def _bf16(shape: GemmShape, left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    if shape.op == "wgrad":
        return (left.T @ right)[None] if shape.groups == 1 else F.grouped_mm(left.T, right, offs=ends)
    right = right.transpose(1, 2) if shape.op == "fprop" else right
    return left @ right[0] if shape.groups == 1 else F.grouped_mm(left, right, offs=ends)


def _cache(device: torch.device) -> int:
    """Bytes of the last cache; on a CPU enough for two sets of the smallest inputs."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 4096


def _cpu(call: Callable[[int], object], sets: int, repeat: int) -> float:
    call(0)
    times: list[float] = []
    for number in range(repeat):
        began = time.perf_counter()
        call(number % sets)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def _gpu(call: Callable[[int], object], sets: int, repeat: int) -> float:
    """Of one call, from replays of a graph of one call for each set: without the time of launches by Python."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # kernels compile and libraries choose before they are captured
        for number in range(min(sets, 3)):
            call(number)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(sets):
            call(number)
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    for began, ended in events:
        began.record()
        graph.replay()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) for began, ended in events) / sets
