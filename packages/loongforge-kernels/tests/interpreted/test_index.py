"""The indexer's Triton kernels against the references in fp64: forward and backward, through the ops themselves."""

from __future__ import annotations

import math

import pytest
import torch
from device import ON_GPU, fp32

from loongforge.kernels.fp8 import hadamard_quant
from loongforge.kernels.fp8 import triton as fp8_triton
from loongforge.kernels.gather_scores import gather_scores
from loongforge.kernels.gather_scores import triton as gather_triton
from loongforge.kernels.gather_scores.reference import gather_scores as gather_truth
from loongforge.kernels.gather_scores.reference import gather_scores_backward as gather_truth_backward
from loongforge.kernels.indexer_logits import indexer_logits
from loongforge.kernels.indexer_logits import triton as logits_triton
from loongforge.kernels.indexer_logits.reference import indexer_logits as logits_truth
from loongforge.kernels.library import NAMESPACE
from loongforge.kernels.lightning_indexer import lightning_indexer
from loongforge.kernels.lightning_indexer import triton as lightning_triton
from loongforge.kernels.lightning_indexer.reference import lightning_indexer as lightning_truth
from loongforge.kernels.select_topk import select_topk
from loongforge.kernels.select_topk import triton as topk_triton
from loongforge.kernels.select_topk.reference import select_topk as topk_truth
from loongforge.kernels.selection_bits import selection_bits
from loongforge.kernels.selection_bits import triton as bits_triton
from loongforge.kernels.selection_bits.reference import selection_bits as bits_truth
from loongforge.kernels.testing import ZOO, Rows, assert_close, assert_matches, poison

# fp32 sums: measured 1.3e-7 at most. bf16 gradients are rounded into a product and out of it: measured 2.6e-3 at most.
EXACT = fp32(4e-7)
ROUNDED = 6e-3
PACKED = next(rows for rows in ZOO if rows.name == "packed")
ODD = Rows(name="odd", documents=(37,), topk=5, queries=(0, 15, 16, 36))
"""Of the zoo's, some queries: a kernel that takes one query at a time sees no more in all of them."""
SHAPES = pytest.mark.parametrize("rows", ZOO, ids=lambda rows: rows.name)


@pytest.fixture(scope="module", autouse=True)
def kernels_run_on_the_cpu() -> None:
    if ON_GPU:  # there they run as they are registered
        return
    for module, names in (
        (logits_triton, ["indexer_logits"]),
        (topk_triton, ["select_topk"]),
        (lightning_triton, ["lightning_indexer"]),
        (gather_triton, ["gather_scores", "gather_scores_backward"]),
        (bits_triton, ["selection_bits"]),
        (fp8_triton, ["hadamard_quant"]),
    ):
        for name in names:
            torch.library.impl(f"{NAMESPACE}::{name}", "cpu", getattr(module, name))


def inputs(rows: Rows, dtype: torch.dtype = torch.float32, heads: int = 6, width: int = 20) -> dict[str, torch.Tensor]:
    """Random q, k and w, w of both signs."""
    torch.manual_seed(len(rows.name))
    queries = len(rows.bounds()[0])
    q, k = torch.randn(queries, heads, width).to(dtype), torch.randn(rows.keys, width).to(dtype)
    return {"q": q.requires_grad_(), "k": k.requires_grad_(), "w": torch.randn(queries, heads).requires_grad_()}


@SHAPES
def test_logits(rows):
    ks, ke = rows.bounds()
    given = {name: x.detach() for name, x in inputs(rows).items()}
    for relu in (True, False):
        assert_matches(
            lambda relu=relu, **x: indexer_logits(**x, ks=ks, ke=ke, relu=relu),
            lambda relu=relu, **x: logits_truth(**x, ks=ks, ke=ke, relu=relu),
            given,
            EXACT,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_logits_of_narrow_numbers_over_several_blocks(dtype, monkeypatch):
    monkeypatch.setattr(logits_triton, "BLOCK_KEYS", 16)
    monkeypatch.setattr(logits_triton, "BLOCK_PAIRS", 16)
    monkeypatch.setattr(logits_triton, "KEYS_EACH", 48)
    rows = Rows(name="blocks", documents=(70, 55), topk=4, queries=(0, 15, 16, 69, 70, 72, 100, -1, 124))
    ks, ke = rows.bounds()
    given = {name: x.detach() for name, x in inputs(rows).items()}
    q, k, w = given["q"].to(dtype), given["k"].to(dtype), given["w"]
    k_scale = torch.rand(rows.keys) + 0.5
    with poison():
        logits = indexer_logits(q, k, w, ks, ke, k_scale=k_scale)
    # products of narrow numbers are exact in fp32, so only sums round
    assert_close("logits", logits, logits_truth(q.double(), k.double(), w, ks, ke, k_scale=k_scale), EXACT)


def logits_with_ties() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of 300 logits of every kind, and their bounds."""
    torch.manual_seed(0)
    logits = torch.randn(14, 300)
    logits[1] = torch.randint(-2, 3, (300,)).float()
    logits[2] = 0.0
    logits[3, ::2], logits[3, 1::2] = -0.0, 0.0
    logits[4] = logits[4].relu() * -1
    logits[5] *= 1e-41  # subnormal
    logits[6] = -1e30 * logits[6].abs()
    logits[7, 5:200] = -torch.inf
    ks = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0, 10, 100, 270, 290, 0, 60], dtype=torch.int32)
    ke = torch.tensor([300] * 8 + [200, 300, 280, 300, 0, 60], dtype=torch.int32)
    key = torch.arange(300)
    unseen = (key < ks[:, None]) | (key >= ke[:, None])
    return logits.masked_fill(unseen, torch.nan), ks, ke


@pytest.mark.parametrize("topk", [1, 20, 129, 400])
def test_selected_keys(topk, monkeypatch):
    monkeypatch.setattr(topk_triton, "BLOCK", 128)
    logits, ks, ke = logits_with_ties()
    with poison():
        found = select_topk(logits, ks, ke, topk)
    for name, have, want in zip(found._fields, found, topk_truth(logits, ks, ke, topk), strict=True):
        assert torch.equal(have, want), name


def test_no_tie_is_written_behind_its_row(monkeypatch):
    """Where the next row would hide it: of one row, in a buffer that goes on."""
    buffers = []

    def longer(*shape, **named):
        buffers.append(torch.full((math.prod(shape) + 9,), 77, **named))
        return buffers[-1][:-9].view(shape)

    monkeypatch.setattr(torch, "empty", longer)
    bound = torch.tensor([300], dtype=torch.int32)
    indices, _, _ = topk_triton.select_topk(torch.zeros(1, 300), bound - 300, bound, 20)
    assert indices.tolist() == [list(range(20))]
    assert all((buffer[-9:] == 77).all() for buffer in buffers)


def test_lightning_indexer():
    """Selection equal to that of fp64, gradients of the scores included; some queries at a time."""
    ks, ke = PACKED.bounds()

    def scores(op, **named):
        return lambda **x: op(**x, ks=ks, ke=ke, topk=PACKED.topk, **named)

    assert_matches(scores(lightning_indexer, chunk_rows=8), scores(lightning_truth), inputs(PACKED), EXACT)


def test_lightning_indexer_of_fp8():
    """Choices are those of the rounded numbers' logits, scores and gradients those of what was given."""
    given, (ks, ke) = inputs(PACKED, heads=3, width=128), PACKED.bounds()
    q, k, w = (x.detach() for x in given.values())
    (q8, q_scale), (k8, k_scale) = hadamard_quant(q), hadamard_quant(k)
    logits = logits_truth(q8.double(), k8.double(), w * q_scale, ks, ke, k_scale=k_scale)
    chosen = topk_truth(logits, ks, ke, PACKED.topk).indices

    def scores(**x):
        found = lightning_indexer(**x, ks=ks, ke=ke, topk=PACKED.topk, fp8=True, chunk_rows=8)
        assert torch.equal(found.indices, chosen)
        return found.scores

    assert_matches(scores, lambda **x: gather_truth(**x, indices=chosen), given, EXACT)


@pytest.mark.parametrize("rows", [ZOO[0], ODD, *ZOO[2:]], ids=lambda rows: rows.name)
def test_gathered_scores(rows):
    indices = rows.indices(holes=True)
    assert_matches(
        lambda **x: gather_scores(**x, indices=indices),
        lambda **x: gather_truth(**x, indices=indices),
        inputs(rows),
        EXACT,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_gathered_scores_summed_in_fixed_point_over_several_blocks(dtype, relu, monkeypatch):
    monkeypatch.setattr(gather_triton, "BLOCK_FORWARD", 16)
    monkeypatch.setattr(gather_triton, "BLOCK_BACKWARD", 16)
    rows = Rows(name="blocks", documents=(50,), topk=37, queries=(3, 20, 36, 49))
    assert_matches(
        lambda **x: gather_scores(**x, indices=rows.indices(), relu=relu, deterministic=True),
        lambda **x: gather_truth(**x, indices=rows.indices(), relu=relu),
        inputs(rows, dtype),
        EXACT if dtype == torch.float32 else ROUNDED,
    )


def test_no_order_changes_a_fixed_point_sum():
    """Queries in another order, as another schedule of a GPU adds them."""
    given = {name: x.detach() for name, x in inputs(PACKED).items()}
    indices, order = PACKED.indices(), torch.randperm(len(given["q"]))
    grad = torch.randn(indices.shape)
    dk = [
        gather_triton.gather_scores_backward(
            grad[rows], given["q"][rows], given["k"], given["w"][rows], indices[rows], True, True
        )[1]
        for rows in (slice(None), order)
    ]
    assert torch.equal(*dk)
    # small as rounding: each of the two is closer to fp64 than a sum in fp32
    wide = [x.double() for x in (grad, *given.values())]
    assert_close("dk", dk[0], gather_truth_backward(*wide, indices, True, True)[1], EXACT)


@pytest.mark.parametrize("rows", [*ZOO, Rows(name="wide", documents=(1050,), topk=7)], ids=lambda rows: rows.name)
def test_selection_bits(rows):
    indices = rows.indices(holes=True)[-40:]
    with poison():
        bits = selection_bits(indices, rows.keys)
    assert torch.equal(bits, bits_truth(indices, rows.keys))
