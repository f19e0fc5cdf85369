"""Compile Triton kernels for Hopper where there is no GPU, and say what the machine code needs.

An op's own launcher is called with tensors on the meta device while its launches are recorded, so that what is compiled
is what the op would run: block sizes, warps, stages, and which pointers and strides are known to be divisible by 16.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SHARED_BYTES = 232448
"""Most shared memory that a block of an H100 or H200 can have; the compiler does not enforce it."""
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of a kernel as its op asked for it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    """By name, constants included."""
    options: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What the machine code of a launch needs, and its text."""

    name: str
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread, where spilled registers go."""
    shared: int
    """Bytes per block."""
    ptx: str
    sass: str

    def count(self, instruction: str) -> int:
        """How often an instruction stands in the machine code: `HGMMA` is Hopper's matrix product, `HMMA` the older."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    @property
    def spills_in_loops(self) -> int:
        """Loads and stores of spilled registers between a label and a later jump back to it."""
        lines = self.sass.splitlines()
        labels: dict[str, int] = {}
        looped: set[int] = set()
        for number, line in enumerate(lines):
            if label := re.match(r"\s*(\.L_x_\d+):", line):
                labels[label[1]] = number
            elif (jump := re.search(r"\bBRA\b.*(\.L_x_\d+)", line)) and jump[1] in labels:
                looped.update(range(labels[jump[1]], number))
        return sum(bool(re.search(r"\b(LDL|STL)\b", lines[number])) for number in looped)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of running them."""
    launches: list[Launch] = []

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        bound = self.signature.bind(*arguments, **named)
        bound.apply_defaults()
        values = dict(bound.arguments)
        at = grid(values) if callable(grid) else grid
        launches.append(Launch(kernel=self, grid=tuple(at), arguments=values, options=options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def build(launch: Launch, capability: int = 90) -> Built:
    """Compile a launch for an NVIDIA architecture; needs no GPU and takes seconds."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for number, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind, aligned = ("constexpr", False) if parameter.is_constexpr else _specialized(value)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(number,)] = value
        if aligned:
            attributes[(number,)] = [["tt.divisibility", 16]]
    options = {"enable_fp_fusion": True} | launch.options  # the default, unsaid a warning from Triton 3.9 on
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage, sass = _read(done.asm["cubin"])
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return Built(
        name=launch.kernel.__name__,
        registers=registers,
        stack=stack,
        shared=done.metadata.shared,
        ptx=done.asm["ptx"],
        sass=sass,
    )


def gate(built: Built, *, wgmma: bool = True, ptx: tuple[str, ...] = (), spills: int = 0) -> None:
    """Fail unless a block fits into an H200, and `ptx` patterns (and wgmma, if asked) occur.

    Loops may touch spilled registers at most `spills` times; whoever allows more than none says why.
    """
    say = f"{built.name}: {built.registers} registers, {built.stack} B stack, {built.shared} B shared"
    assert built.shared <= SHARED_BYTES, f"{say}; at most {SHARED_BYTES} B of shared memory exist"
    assert built.spills_in_loops <= spills, f"{say}; {built.spills_in_loops} accesses to spilled registers within loops"
    if wgmma:
        assert built.count("HGMMA[.0-9A-Zx]*") > 0, f"{say}; no warpgroup matrix product"
    for pattern in ptx:
        assert re.search(pattern, built.ptx), f"{say}; its PTX has no {pattern!r}"


def _specialized(value: Any) -> tuple[str, bool]:
    """Type of an argument as Triton's launcher sees it, and whether it is known to be divisible by 16."""
    if value is None:
        return "constexpr", False
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}", value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, bool):
        return "u1", False
    if isinstance(value, float):
        return "fp32", False
    if value == 1:
        return "constexpr", False
    return "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0


def _read(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([TOOLS / "cuobjdump", "-res-usage", file.name], [TOOLS / "nvdisasm", "-c", file.name])
        usage, sass = (subprocess.run(one, capture_output=True, text=True, check=True).stdout for one in commands)
    return usage, sass
