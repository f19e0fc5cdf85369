"""The FP8 benchmark: emulated on a CPU, every op and recipe against BF16; on a GPU where there is one."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from loongforge.kernels.fp8 import Engine, GemmShape, Operand, Policy, benchmark
from loongforge.kernels.fp8.bench import _bf16, _inputs  # its own products, which are compared with plain ones
from loongforge.kernels.fp8.engine import EMULATED, TORCH, boundaries
from loongforge.kernels.testing import error_ratio


def multiplies_on_cpu() -> bool:
    """Whether this torch has FP8 products on a CPU: 2.15 does, 2.11 on GPUs alone."""
    one, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(1, 1)
    kind = F.ScalingType.TensorWise
    try:
        F.scaled_mm(one, one.T, scale, kind, scale, kind, output_dtype=torch.bfloat16)
    except NotImplementedError:
        return False
    return True


needs_products = pytest.mark.skipif(not multiplies_on_cpu(), reason="this torch multiplies FP8 on GPUs alone")

OPS, RECIPES = ("fprop", "dgrad", "wgrad"), ("tensorwise", "rowwise", "blockwise")
CPU = torch.device("cpu")


def shapes(groups: tuple[int, ...] = (1, 3), sizes: tuple[int, int, int] = (68, 144, 160)) -> list[GemmShape]:
    m, n, k = sizes
    return [
        GemmShape(op=op, m=m, n=n, k=k, groups=count, recipe=recipe)
        for op, recipe, count in itertools.product(OPS, RECIPES, groups)
    ]


def plain(shape: GemmShape, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """What each op is, in fp64, a group at a time; dw of all groups stands one under the other."""
    ends, left, right = boundaries(shape), left.double(), right.double()
    parts = [slice(a, b) for a, b in itertools.pairwise(ends)]
    if shape.op == "wgrad":
        return torch.cat([left[rows].T @ right[rows] for rows in parts])
    weights = [w.T if shape.op == "fprop" else w for w in right]
    return torch.cat([left[rows] @ w for rows, w in zip(parts, weights, strict=True)])


def test_rows_are_dealt_to_groups_by_sixteens():
    shape = GemmShape(op="wgrad", m=68, n=8, k=8, groups=3, recipe="rowwise")
    assert boundaries(shape) == [0, 16, 32, 68]
    assert boundaries(dataclasses.replace(shape, m=160)) == [0, 48, 96, 160]
    assert boundaries(dataclasses.replace(shape, m=7)) == [0, 2, 4, 7]


@pytest.mark.parametrize("shape", shapes(), ids=lambda shape: shape.line())
def test_both_products_are_those_of_the_op(shape):
    left, right = _inputs(shape, CPU, 0)
    want = plain(shape, left, right)
    ends = torch.tensor(boundaries(shape)[1:], dtype=torch.int32)
    bf16 = _bf16(shape, left, right, ends).flatten(0, -2)
    assert error_ratio(bf16, want) < 5e-3  # rounding to bf16, 1.7e-3 measured
    weights = right if shape.op == "wgrad" else EMULATED.weights(shape, right)
    fp8 = torch.cat(EMULATED.step(shape, left, weights))
    assert fp8.shape == want.shape
    assert error_ratio(fp8, want) < 0.045  # 0.037 measured
    if shape.recipe != "blockwise" and multiplies_on_cpu():  # torch has no product of blocks on a CPU
        exact = torch.cat(TORCH.step(shape, left, weights))
        assert error_ratio(exact, fp8) < 5e-3  # other orders of sums, then bf16


@pytest.mark.parametrize("op", OPS)
def test_scales_of_blocks_lie_as_cublas_reads_them(op, monkeypatch):
    """torch has no such product on a CPU, so what it would get is held against the checks in its ScaledBlas.cpp."""
    shape = GemmShape(op=op, m=256, n=384, k=640, recipe="blockwise")

    def scaled_mm(a, b, scale_a, kind_a, scale_b, kind_b, output_dtype):
        contracted = -(-a.shape[1] // 128)
        assert a.is_contiguous()
        assert b.T.is_contiguous()
        assert (tuple(scale_a.shape), scale_a.stride()) == ((len(a), contracted), (1, len(a)))
        if kind_b == F.ScalingType.BlockWise128x128:
            padded, width = -(-contracted // 4) * 4, b.shape[1] // 128
            assert (tuple(scale_b.shape), scale_b.stride()) == ((padded, width), (1, padded))
            right = Operand(b.T, scale_b.T[:, :contracted].contiguous(), (128, 128))
        else:
            assert (tuple(scale_b.shape), scale_b.stride()) == ((b.shape[1], contracted), (1, b.shape[1]))
            right = Operand(b.T, scale_b, (1, 128))
        assert kind_a == F.ScalingType.BlockWise1x128
        assert (kind_b == F.ScalingType.BlockWise128x128) == (op != "wgrad")
        return EMULATED.product(Operand(a, scale_a, (1, 128)), right, "blockwise").to(output_dtype)

    left, right = _inputs(shape, CPU, 0)
    weights = right if op == "wgrad" else TORCH.weights(shape, right)
    want = EMULATED.step(shape, left, weights)
    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    assert torch.equal(TORCH.step(shape, left, weights)[0], want[0])


def test_an_emulated_report_decides_nothing():
    heard: list[str] = []
    wanted = [*shapes((1,), (32, 16, 48)), *shapes((2,), (32, 16, 48))]
    found = benchmark(wanted * 2, device="cpu", micro_batches=4, repeat=3, say=heard.append)
    assert [one.shape for one in found.measurements] == wanted
    assert found.refusals == ()
    assert found.emulated
    assert (found.device, found.micro_batches, found.torch) == ("cpu", 4, torch.__version__)
    assert all((one.weight_ms == 0) == (one.shape.op == "wgrad") for one in found.measurements)
    assert len(heard) == len(wanted)
    assert heard[0].startswith("fp8: fprop, M 32, N 16, K 48, tensorwise: ")
    decision = Policy.merge(found, margin=1.0).decide(wanted[0], "cpu")
    assert (decision.use_fp8, decision.source) == (False, "times on cpu are emulated and decide nothing")


@needs_products
def test_no_engine_makes_times_of_a_cpu_count():
    shape = GemmShape(op="fprop", m=32, n=32, k=64, recipe="rowwise")
    found = benchmark([shape], device="cpu", engine=TORCH, repeat=1)
    assert (len(found.measurements), found.emulated, found.engine) == (1, True, TORCH.name)


@needs_products
def test_wrong_and_impossible_products_are_refused_with_the_reason():
    def shifted(left: Operand, right: Operand, recipe: str) -> torch.Tensor:
        return EMULATED.product(Operand(left.q, left.scale.roll(1, -1), left.block), right, "blockwise")

    shape = GemmShape(op="fprop", m=32, n=128, k=256, recipe="blockwise")
    found = benchmark([shape], device="cpu", engine=Engine(name="shifted", product=shifted), repeat=1)
    assert found.measurements == ()
    assert "the result is wrong: " in found.refusals[0].reason
    few = GemmShape(op="fprop", m=2, n=16, k=16, groups=3, recipe="rowwise")
    found = benchmark([few, shape], device="cpu", engine=TORCH, repeat=1)
    assert found.refusals[0].reason == "M 2 leaves groups without rows, at least 3 are needed."
    assert "scaling" in found.refusals[1].reason


def test_inputs_take_turns():
    seen: list[float] = []

    def watched(left: Operand, right: Operand, recipe: str) -> torch.Tensor:
        seen.append(left.dequantized().sum().item())
        return EMULATED.product(left, right, "rowwise")

    shape = GemmShape(op="fprop", m=8, n=8, k=64, recipe="rowwise")
    benchmark([shape], device="cpu", engine=Engine(name="watched", product=watched), repeat=8)
    timed = seen[2:]  # after a look at the result and a call to warm up
    assert len(set(timed)) == 4  # sets of 2 KiB beyond twice the 4 KiB that a CPU's cache is taken for
    assert timed == timed[:4] * 2


def test_other_devices_and_counts_are_refused():
    with pytest.raises(ValueError, match="micro_batches is 0 and repeat 20, 1 or more are needed"):
        benchmark([], device="cpu", micro_batches=0)
    with pytest.raises(ValueError, match="device is meta, cpu or cuda is needed"):
        benchmark([], device="meta")


@pytest.mark.gpu
def test_every_op_and_recipe_on_a_gpu():
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a Hopper GPU")
    found = benchmark(shapes((1, 2), (512, 256, 384)), repeat=5)
    assert found.refusals == ()
    assert not found.emulated
    assert len(found.measurements) == 18
