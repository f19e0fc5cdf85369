"""Time and memory of each op, forward and backward, against what a model would use without this wheel.

`python packages/loongforge-kernels/bench/ops.py [--threads 1] [--repeat 10] [--only rms_norm]`. Rivals run in turn, so
that noise meets them alike; the time is the lower quartile. Gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from loongforge.kernels.adamw import adamw
from loongforge.kernels.cross_entropy import cross_entropy
from loongforge.kernels.host_memory import keep_freed_memory
from loongforge.kernels.linear_cross_entropy import linear_cross_entropy
from loongforge.kernels.rms_norm import rms_norm
from loongforge.kernels.rms_norm.reference import rms_norm as plain_rms_norm
from loongforge.kernels.rope import rope
from loongforge.kernels.rope.reference import rope as plain_rope
from loongforge.kernels.swiglu import swiglu
from loongforge.kernels.testing import assert_close

Case = tuple[str, list[torch.Tensor], dict[str, Callable[..., torch.Tensor]]]


def plain_swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up with torch's autograd."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def leaf(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """A random input that wants a gradient."""
    return (torch.randn(shape) * scale).to(dtype).requires_grad_()


def cases(dtype: torch.dtype) -> list[Case]:
    """Every comparison: name, inputs, and the rivals, the plain one first."""
    found: list[Case] = []
    for shape in ((256, 4, 256), (512, 2, 768)):
        native = {
            "plain": plain_rms_norm,
            "torch": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
            "ours": rms_norm,
        }
        found.append((f"rms_norm {shape}", [leaf(*shape, dtype=dtype), leaf(shape[-1], dtype=dtype)], native))
    for shape in ((1024, 1536), (1024, 4096)):
        found.append((f"swiglu {shape}", [leaf(*shape, dtype=dtype)], {"plain": plain_swiglu, "ours": swiglu}))
    for shape in ((256, 4, 4, 64), (512, 2, 12, 64)):
        angle = torch.rand(shape[0], 1, 1, shape[-1] // 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        turns = {
            "plain": lambda x, c=cos, s=sin: plain_rope(x, c, s),
            "ours": lambda x, c=cos, s=sin: rope(x, c, s),
        }
        found.append((f"rope {shape}", [leaf(*shape, dtype=dtype)], turns))
    for tokens, vocab in ((1024, 1000), (1024, 8192), (512, 32000)):
        labels = torch.randint(vocab, (tokens,))
        losses = {
            "plain": lambda x, y=labels: F.cross_entropy(x.float(), y, reduction="none"),
            "ours": lambda x, y=labels: cross_entropy(x, y),
        }
        found.append((f"cross_entropy {(tokens, vocab)}", [leaf(tokens, vocab, dtype=dtype)], losses))
    for tokens, hidden, vocab in ((1024, 256, 8192), (1024, 768, 32000)):
        found.append(
            (
                f"linear_cross_entropy {(tokens, hidden, vocab)}",
                [leaf(tokens, hidden, dtype=dtype), leaf(vocab, hidden, dtype=dtype, scale=0.02)],
                linear_rivals(torch.randint(vocab, (tokens,))),
            )
        )
    return found


def linear_rivals(labels: torch.Tensor) -> dict[str, Callable[..., torch.Tensor]]:
    """Whole logits against blocks."""
    return {
        "plain": lambda h, w: F.cross_entropy(F.linear(h, w).float(), labels, reduction="none"),
        "ours": lambda h, w: linear_cross_entropy(h, w, labels),
    }


def once(call: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> float:
    """Seconds of one forward and backward."""
    for x in inputs:
        x.grad = None
    began = time.perf_counter()
    call(*inputs).mean().backward()
    return time.perf_counter() - began


def gate(case: Case) -> None:
    """All rivals must agree on every gradient: fp32 to 1e-5, bf16 to 2 %."""
    name, inputs, rivals = case
    expected: list[torch.Tensor] = []
    for call in rivals.values():
        once(call, inputs)
        have = [x.grad.clone() for x in inputs if x.grad is not None]
        expected = expected or have
        for one, other in zip(have, expected, strict=True):
            assert_close(name, one, other, 1e-5 if one.dtype == torch.float32 else 2e-2)


def measure(case: Case, repeat: int) -> None:
    """Print one row."""
    gate(case)
    name, inputs, rivals = case
    times: dict[str, list[float]] = {rival: [] for rival in rivals}
    for _ in range(repeat):
        for rival, call in rivals.items():
            times[rival].append(once(call, inputs))
    quartile = {rival: sorted(values)[len(values) // 4] * 1e3 for rival, values in times.items()}
    row = "  ".join(f"{rival} {value:8.2f} ms" for rival, value in quartile.items())
    print(
        f"{str(inputs[0].dtype)[6:]:9}{name:40}{row}  ours/plain {quartile['ours'] / quartile['plain']:.2f}", flush=True
    )


def measure_adamw(millions: int, repeat: int) -> None:
    """Print the time of one step of torch's three forms and ours."""
    shapes = [(768, 768), (3072, 768), (768,)] * max(1, millions * 1_000_000 // (768 * 768 * 5))
    parameters = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    data, grads = [p.data for p in parameters], [p.grad for p in parameters if p.grad is not None]
    first, second = ([torch.zeros_like(p) for p in data] for _ in range(2))
    rivals: dict[str, Callable[[], object]] = {
        name: torch.optim.AdamW(parameters, **{"foreach": False, "fused": False} | {name: True}).step
        for name in ("foreach", "fused")
    }
    rivals["default"] = torch.optim.AdamW(parameters).step
    rivals["ours"] = lambda: adamw(data, grads, first, second, step=1, lr=1e-3)
    for name, call in rivals.items():
        call()
        times = []
        for _ in range(repeat):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        print(f"adamw {millions}M {name:8} {sorted(times)[len(times) // 4] * 1e3:8.1f} ms", flush=True)


def measure_peak(tokens: int, hidden: int, vocab: int) -> None:
    """Print the resident memory that whole logits and blocks add at their peak, each in its own process."""
    script = (
        "import re, sys, torch\nsys.path.insert(0, {folder!r})\nfrom ops import leaf, linear_rivals, once\n"
        "torch.set_num_threads(1)\n"
        "inputs = [leaf({t}, {h}, dtype=torch.float32), leaf({v}, {h}, dtype=torch.float32)]\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) // 1024\n"
        "before = peak()\n"
        "once(linear_rivals(torch.randint({v}, ({t},)))[{rival!r}], inputs)\nprint(peak() - before)"
    )
    folder = __file__.rpartition("/")[0] or "."
    for rival in ("plain", "ours"):
        code = script.format(folder=folder, t=tokens, h=hidden, v=vocab, rival=rival)
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        print(f"peak linear_cross_entropy {(tokens, hidden, vocab)} {rival:6}{int(done.stdout):6} MiB", flush=True)


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--only", default="", help="ops whose name begins with this")
    parser.add_argument("--keep-memory", action="store_true", help="with host_memory.keep_freed_memory()")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.keep_memory:
        assert keep_freed_memory(), "the C library does not support it"
    print(f"torch {torch.__version__}, {options.threads} thread(s), keep memory: {options.keep_memory}")
    for dtype in (torch.float32, torch.bfloat16):
        for case in cases(dtype):
            if case[0].startswith(options.only):
                measure(case, options.repeat)
    if "adamw".startswith(options.only):
        measure_adamw(7, options.repeat)
        measure_adamw(100, min(3, options.repeat))
    if "peak".startswith(options.only):
        measure_peak(2048, 256, 50000)


if __name__ == "__main__":
    main()
