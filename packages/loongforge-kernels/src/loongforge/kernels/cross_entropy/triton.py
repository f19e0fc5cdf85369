"""Cross entropy as Triton kernels: a row of logits is read once for its loss, and once more where a gradient is asked.

A program has a row. It keeps a maximum and a sum of exponentials in every lane (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018) and leaves the label out of both: where the model is sure, loss and gradient
of the label are what the others add up to, with all its digits. For the gradient it goes back from the end of the row,
which the cache still has. Everything between load and store is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from loongforge.kernels.tiles import adjacent

BLOCK = 4096
"""Columns in one turn: 16 bytes of 16-bit logits for each of 512 threads. That takes 40 registers, so that three rows
share a multiprocessor; with twice the columns it takes 70, and one row has it alone."""
WARPS = 16
LOWEST = tl.constexpr(-3.0e38)
"""Below every logit but minus infinity, from which it has a distance."""


@triton.jit
def _survey(logits, label, columns, BLOCK: tl.constexpr):
    """The largest of a row without its label, and the sum of exponentials relative to it; of no numbers LOWEST, 0."""
    column = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        at = first + column
        x = tl.load(logits + at, mask=at < columns, other=-float("inf")).to(tl.float32)
        x = tl.where(at == label, -float("inf"), x)
        less = tl.exp(-tl.abs(x - top))  # of the smaller of the two relative to the larger: one exponential, not two
        total = tl.where(x > top, total * less + 1.0, total + less)
        top = tl.maximum(top, x)
    highest = tl.max(top, 0)
    return highest, tl.sum(total * tl.exp(top - highest), 0)


@triton.jit
def _write_gradient(logits, out, label, columns, top, rest, distance, factor, BLOCK: tl.constexpr):
    """factor * d loss / d logits of a row, which may stand where its logits do."""
    column = tl.arange(0, BLOCK)
    turns = tl.cdiv(columns, BLOCK)
    if factor == 0.0:
        for turn in range(turns):
            at = turn * BLOCK + column
            tl.store(out + at, tl.zeros((BLOCK,), out.dtype.element_ty), mask=at < columns)
    else:
        scale = factor / (rest + tl.exp(distance))
        for turn in range(turns):
            at = (turns - 1 - turn) * BLOCK + column
            x = tl.load(logits + at, mask=at < columns, other=0.0).to(tl.float32)
            slope = tl.where(at == label, -rest, tl.exp(x - top)) * scale
            tl.store(out + at, slope.to(out.dtype.element_ty), mask=at < columns)


@triton.jit
def _forward(
    logits_ptr, label_ptr, factor_ptr, loss_ptr, found_ptr, rows, columns, stride, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits = logits_ptr + row.to(tl.int64) * stride
    label = tl.load(label_ptr + row)
    mine = (label >= 0) & (label < columns)
    # read before the sums, which wait for all threads: behind them others write gradients here
    picked = tl.load(logits + label, mask=mine, other=float("nan")).to(tl.float32)
    highest, total = _survey(logits, label, columns, BLOCK)
    top = tl.maximum(highest, picked)
    rest = total * tl.exp(highest - top)
    distance = picked - top
    # log1p: what 1 + rest rounds away comes back as rest / (the sum - 1)
    near = rest + 1.0  # pyright: ignore[reportOperatorIssue]
    kept = near - 1.0  # pyright: ignore[reportOperatorIssue]
    sure = tl.where(kept == 0.0, rest, tl.log(kept + 1.0) * (rest / tl.where(kept == 0.0, 1.0, kept)))
    loss = tl.where(distance == 0.0, sure, tl.log(rest + tl.exp(distance)) - distance)
    tl.store(loss_ptr + row, loss)
    tl.store(found_ptr + row, top)
    tl.store(found_ptr + rows + row, rest)
    tl.store(found_ptr + 2 * rows + row, distance)
    if GRADIENT:
        factor = tl.load(factor_ptr + row)
        _write_gradient(logits, logits, label, columns, top, rest, distance, factor, BLOCK)


@triton.jit
def _backward(
    logits_ptr, out_ptr, label_ptr, factor_ptr, found_ptr, rows, columns, stride, out_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    wide = row.to(tl.int64)
    top, rest = tl.load(found_ptr + row), tl.load(found_ptr + rows + row)
    distance, factor = tl.load(found_ptr + 2 * rows + row), tl.load(factor_ptr + row)
    _write_gradient(
        logits_ptr + wide * stride, out_ptr + wide * out_stride, tl.load(label_ptr + row), columns, top, rest, distance,
        factor, BLOCK,
    )  # fmt: skip


def losses(logits: Tensor, index: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Loss fp32 `[R, 1]` of logits `[R, V]` at labels int64 `[R, 1]`, NaN at a label that is no column; and findings.

    Findings, fp32 `[3, R]`, are the largest logit; the sum of exponentials relative to it, without the label's; and
    the label's logit minus the largest. With factor fp32 `[R, 1]` the logits become factor * d loss / d logits.
    """
    rows, columns = logits.shape
    loss = torch.empty(rows, 1, dtype=torch.float32, device=logits.device)
    found = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    if rows:
        launch: Any = _forward[(rows,)]
        launch(
            logits, index, loss if factor is None else factor, loss, found, rows, columns, logits.stride(0),
            GRADIENT=factor is not None, **_cut(columns),
        )  # fmt: skip
    return loss, found


def gradient(logits: Tensor, index: Tensor, factor: Tensor, found: Tensor, out: Tensor) -> None:
    """Write factor `[R, 1]` * d loss / d logits to `out` `[R, V]`, which may be `logits`; `found` as of `losses`.

    A label that is no column is another rank's: every column has its probability then.
    """
    rows, columns = logits.shape
    if rows:
        launch: Any = _backward[(rows,)]
        launch(
            logits, out, index, factor, found, rows, columns, logits.stride(0), out.stride(0), **_cut(columns)
        )  # fmt: skip


def _cut(columns: int) -> dict[str, int]:
    """Block and warps for a row; a short one takes fewer of both."""
    block = min(BLOCK, max(128, triton.next_power_of_2(columns)))
    return {"BLOCK": block, "num_warps": max(1, block * WARPS // BLOCK)}


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        rows, flat = adjacent(logits.reshape(-1, logits.shape[-1])), labels.reshape(-1)
        kept = flat != ignore_index
        index = flat.where(kept, 0)
        loss, found = losses(rows, index)
        ctx.save_for_backward(rows, index, kept, found)
        ctx.shape = logits.shape
        return loss.squeeze(1).where(kept, 0).view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, index, kept, found = ctx.saved_tensors
        dlogits = torch.empty_like(rows, memory_format=torch.contiguous_format)
        gradient(rows, index, grad.reshape(-1).where(kept, 0), found, dlogits)
        return dlogits.view(ctx.shape), None, None


def cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """loss `[...]` from logits `[..., V]` and labels `[...]`; see the package. Another label than a column: NaN."""
    return _CrossEntropy.apply(logits, labels, ignore_index)
