"""The ops of sparse attention as torch sees them on a CPU: gradients, registration, and agreement with other code."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from dsa_inputs import bits_of, masked, normal, sparse
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loongforge.kernels.attention_target import attention_target
from loongforge.kernels.indexer_kl import indexer_kl
from loongforge.kernels.indexer_kl import reference as kl_reference
from loongforge.kernels.masked_mha import masked_mha
from loongforge.kernels.masked_mha import reference as masked_reference
from loongforge.kernels.sparse_mla import reference as sparse_reference
from loongforge.kernels.sparse_mla import sparse_mla
from loongforge.kernels.testing import ZOO, Rows, assert_close, assert_matches

RATIO = {torch.float32: 3e-6, torch.bfloat16: 6e-3}
"""Measured 1.5e-6 (a query with one key, whose gradient is a difference to 0; otherwise 5e-7) and 3.1e-3."""
ROUNDED = next(rows for rows in ZOO if rows.name == "packed")
"""Where bf16 is tried: the others differ in which keys there are, not in how numbers are rounded."""
CASES = pytest.mark.parametrize(
    ("rows", "dtype"),
    [*((rows, torch.float32) for rows in ZOO), (ROUNDED, torch.bfloat16)],
    ids=lambda x: x.name if isinstance(x, Rows) else str(x),
)
EVERY_ROW = pytest.mark.parametrize("rows", ZOO, ids=lambda rows: rows.name)
SMALL = Rows(name="small", documents=(3, 5), topk=4, queries=(0, 1, 2, -1, 3, 7, 5))


@CASES
def test_masked_mha(rows: Rows, dtype: torch.dtype):
    op, truth = (partial(f, scale=0.3) for f in (masked_mha, masked_reference.masked_mha))
    assert_matches(op, truth, masked(rows, 3, 24, 16, dtype), RATIO[dtype])


@CASES
@pytest.mark.parametrize("sink", [False, True], ids=["", "sink"])
def test_sparse_mla(rows: Rows, dtype: torch.dtype, sink: bool):
    inputs = sparse(rows, 3, 20, 6, dtype) | ({"attn_sink": normal(3, seed=4)} if sink else {})
    op, truth = (partial(f, scale=0.3, d_v=20) for f in (sparse_mla, sparse_reference.sparse_mla))
    assert_matches(op, truth, inputs, RATIO[dtype])


@EVERY_ROW
def test_attention_target(rows: Rows):
    inputs = sparse(rows, 3, 20, 6)
    _, lse = sparse_mla(**inputs, scale=0.3, d_v=20)
    target = attention_target(**inputs, lse=lse, scale=0.3)
    assert not target.requires_grad
    picked, valid = sparse_reference.gathered(inputs["kv"], inputs["indices"])
    weights, _ = sparse_reference.probabilities(inputs["q"], picked, valid, 0.3)
    assert_close("target", target, weights.sum(1), 1e-6)


def kl_inputs(rows: Rows) -> dict[str, Tensor]:
    missing = rows.indices() < 0
    scores = normal(*missing.shape, seed=1, grad=False).masked_fill(missing, float("-inf"))
    return {
        "scores": scores.requires_grad_(),
        "target": normal(*missing.shape, seed=2, grad=False).square(),
        "row_weight": normal(len(missing), seed=3, grad=False).square().requires_grad_(),
    }


@EVERY_ROW
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_indexer_kl(rows: Rows, reduction: str, weighted: bool):
    inputs = kl_inputs(rows)
    if not weighted:
        del inputs["row_weight"]
    op, truth = (partial(f, reduction=reduction) for f in (indexer_kl, kl_reference.indexer_kl))
    assert_matches(op, truth, inputs, 2e-6)


def test_indexer_kl_is_torchs_divergence():
    inputs = kl_inputs(Rows(name="full", documents=(6,), queries=(5, 5, 5), topk=6))
    share = inputs["target"] / inputs["target"].sum(1, keepdim=True)
    expected = F.kl_div(torch.log_softmax(inputs["scores"], 1), share, reduction="batchmean")
    assert indexer_kl(inputs["scores"], inputs["target"]).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(ValueError, match="reduction='max' is not 'mean', 'sum' or 'none'"):
        indexer_kl(inputs["scores"], inputs["target"], reduction="max")


def test_masked_mha_is_torchs_attention_with_that_mask():
    rows = ZOO[3]
    inputs = masked(rows, 4, 24, 16)
    seen = masked_reference.visible(inputs["bits"], inputs["ks"], inputs["ke"], rows.keys)
    q, k, v = (inputs[name].transpose(0, 1) for name in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3).transpose(0, 1)
    out, _ = masked_mha(**inputs, scale=0.3)
    leaves = [inputs[name] for name in "qkv"]
    grad = normal(*out.shape, seed=9, grad=False)
    assert_close("output", out, expected, 1e-6)
    pairs = zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
    for name, (mine, theirs) in zip("qkv", pairs, strict=True):
        assert_close(name, mine, theirs, 2e-6)


def test_masked_mha_without_bits_is_torchs_causal_attention():
    rows = Rows(name="whole", documents=(13,), topk=1)
    inputs = masked(rows, 4, 24, 16) | {"bits": None}
    q, k, v = (inputs[name].transpose(0, 1) for name in "qkv")
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3).transpose(0, 1)
    assert_close("output", masked_mha(**inputs, scale=0.3)[0], expected, 1e-6)


def test_both_forms_agree_when_the_up_projection_is_absorbed():
    rows, heads, latent, rope, nope, value = SMALL, 3, 20, 6, 10, 7
    q = normal(len(rows.bounds()[0]), heads, nope + rope, seed=1, dtype=torch.float64)
    kv = normal(rows.keys, latent + rope, seed=2, dtype=torch.float64)
    up = normal(heads, nope + value, latent, seed=3, dtype=torch.float64)
    indices = rows.indices()
    absorbed = torch.cat((torch.einsum("thn,hnl->thl", q[..., :nope], up[:, :nope]), q[..., nope:]), -1)
    compressed, lse = sparse_mla(absorbed, kv, indices, scale=0.3, d_v=latent)
    gathered = torch.einsum("thl,hvl->thv", compressed, up[:, nope:])
    wide = torch.einsum("sl,hnl->shn", kv[:, :latent], up)
    k = torch.cat((wide[..., :nope], kv[:, None, latent:].expand(-1, heads, -1)), -1)
    ks, ke = rows.bounds()
    out, lse_wide = masked_mha(q, k, wide[..., nope:], bits_of(indices, rows.keys), ks, ke, 0.3)
    assert_close("output", gathered, out, 1e-13)
    assert_close("lse", lse, lse_wide, 1e-13)
    grad = normal(*out.shape, seed=5, dtype=torch.float64, grad=False)
    ours, theirs = (torch.autograd.grad(x, (q, kv, up), grad, retain_graph=True) for x in (gathered, out))
    for name, one, other in zip(("q", "kv", "up"), ours, theirs, strict=True):
        assert_close(name, one, other, 1e-13)


def wide(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for name, x in inputs.items()
    }


OPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "masked_mha": (partial(masked_mha, scale=0.3), masked(SMALL, 2, 5, 3)),
    "causal": (partial(masked_mha, scale=0.3), masked(SMALL, 2, 5, 3) | {"bits": None}),
    "sparse_mla": (partial(sparse_mla, scale=0.3, d_v=4), sparse(SMALL, 2, 4, 2)),
    "sparse_mla with a sink": (
        partial(sparse_mla, scale=0.3, d_v=4, deterministic=True),
        sparse(SMALL, 2, 4, 2) | {"attn_sink": normal(2, seed=4)},
    ),
    "indexer_kl": (indexer_kl, kl_inputs(SMALL)),
}
EVERY_OP = pytest.mark.parametrize(("op", "inputs"), OPS.values(), ids=OPS)


def first(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found[0]


@EVERY_OP
def test_gradcheck(op: Any, inputs: dict[str, Any]):
    inputs = wide(inputs)
    leaves = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]

    def finite(*values: Tensor) -> Any:
        found = op(**inputs | dict(zip(leaves, values, strict=True)))
        found = (found,) if isinstance(found, Tensor) else found
        return tuple(x.masked_fill(x == float("-inf"), 0.0) for x in found)  # finite differences of -inf are NaN

    # by random directions; each number against autograd of the reference is above
    assert torch.autograd.gradcheck(finite, [inputs[name] for name in leaves], fast_mode=True)


@EVERY_OP
def test_compiled_and_recomputed_gradients_are_the_same(op: Any, inputs: dict[str, Any]):
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]

    def loss(values: dict[str, Any]) -> Tensor:
        return first(op(**values)).square().sum()

    plain = torch.autograd.grad(loss(inputs), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    recomputed = checkpoint(loss, inputs, use_reentrant=False)
    for again in (torch.autograd.grad(compiled(inputs), leaves), torch.autograd.grad(recomputed, leaves)):
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # opcheck's own copies of the inputs
@pytest.mark.parametrize("name", ["masked_mha", "sparse_mla", "attention_target", "indexer_divergence"])
def test_registration(name: str):
    rows = SMALL
    lse = normal(len(rows.bounds()[0]), 2, seed=7, grad=False)
    arguments = {
        "masked_mha": (*masked(rows, 2, 5, 3).values(), 0.3),
        "sparse_mla": (*sparse(rows, 2, 4, 2).values(), 0.3, 4, normal(2, seed=4), False),
        "attention_target": (*(x.detach() for x in sparse(rows, 2, 4, 2).values()), lse, 0.3),
        "indexer_divergence": tuple(kl_inputs(rows).values())[:2],
    }[name]
    torch.library.opcheck(getattr(torch.ops.loongforge, name).default, arguments)


def test_what_the_gpu_kernels_refuse():
    pytest.importorskip("triton")
    from loongforge.kernels.sparse_mla.triton import check

    half, meta = torch.bfloat16, torch.device("meta")
    check(torch.empty(3, 128, 576, dtype=half, device=meta), 512)
    for heads, d_v, width in ((129, 512, 576), (16, 500, 564), (16, 512, 520)):
        with pytest.raises(ValueError, match=rf"not {heads} heads, {d_v} and {width - d_v}; `loongforge.*` takes any"):
            check(torch.empty(3, heads, width, dtype=half, device=meta), d_v)
    wide = mock.Mock(device=torch.device("cuda"), dtype=torch.float32)
    with pytest.raises(ValueError, match="sparse_mla on a GPU takes bfloat16 and float16, not float32"):
        check(wide, 512)
