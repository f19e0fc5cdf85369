"""The indexer's ops on the CPU: against plain Python and autograd of the references."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from loongforge.kernels.fp8 import hadamard_quant
from loongforge.kernels.gather_scores import gather_scores
from loongforge.kernels.gather_scores.reference import gather_scores as gather_truth
from loongforge.kernels.indexer_logits import indexer_logits
from loongforge.kernels.indexer_logits.reference import indexer_logits as logits_truth
from loongforge.kernels.lightning_indexer import lightning_indexer
from loongforge.kernels.lightning_indexer.reference import lightning_indexer as lightning_truth
from loongforge.kernels.row_bounds import row_bounds, zigzag_rows
from loongforge.kernels.select_topk import select_topk
from loongforge.kernels.selection_bits import selection_bits
from loongforge.kernels.testing import ZOO, Rows, assert_matches, error_ratio

SHAPES = pytest.mark.parametrize("rows", ZOO, ids=lambda rows: rows.name)
PACKED = next(rows for rows in ZOO if rows.name == "packed")
# Measured: 0 in fp64, 1.2e-7 at most in fp32, and 2.2e-3 in bf16, whose gradients are rounded on the way out.
RATIO = {torch.float64: 1e-14, torch.float32: 4e-7, torch.bfloat16: 6e-3}


def inputs(rows: Rows, dtype: torch.dtype = torch.float64, width: int = 5) -> dict[str, torch.Tensor]:
    """Random q, k and w for three heads, w of both signs."""
    generator = torch.Generator().manual_seed(rows.keys)
    queries = len(rows.bounds()[0])
    shapes = {"q": (queries, 3, width), "k": (rows.keys, width), "w": (queries, 3)}
    wide = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: x.to(dtype if name != "w" else torch.float32).requires_grad_() for name, x in wide.items()}


@SHAPES
def test_row_bounds(rows):
    ends = torch.tensor([0, *rows.documents]).cumsum(0).int()
    chosen = None if rows.queries is None else torch.tensor(rows.queries)
    for have, want in zip(row_bounds(ends, chosen), rows.bounds(), strict=True):
        assert have.dtype == torch.int32
        assert torch.equal(have, want)


def test_row_bounds_of_padding_an_empty_document_and_what_is_not_causal():
    ks, ke = row_bounds(torch.tensor([0, 3, 3, 5]), torch.tensor([2, 3, 4, 5, 9, -1]), causal=False)
    assert ks.tolist() == [0, 3, 3, 0, 0, 0]
    assert ke.tolist() == [3, 5, 5, 0, 0, 0]


def test_ranks_hold_the_first_and_the_last_chunk_of_every_document():
    ends = torch.tensor([0, 8, 12])
    assert zigzag_rows(ends, 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_rows(ends, 1, 2).tolist() == [2, 3, 4, 5, 9, 10]
    assert zigzag_rows(ends, 0, 1).tolist() == list(range(12))
    with pytest.raises(ValueError, match="document 1 has 4 rows: pad it to a multiple of 2 x size = 8"):
        zigzag_rows(ends, 0, 4)
    with pytest.raises(ValueError, match="rank=2 must be from 0 to size - 1 = 1"):
        zigzag_rows(ends, 2, 2)


@SHAPES
def test_logits_are_the_sum_as_it_is_written(rows):
    q, k, w = (x.detach() for x in inputs(rows).values())
    ks, ke = rows.bounds()
    for relu in (True, False):
        logits = indexer_logits(q, k, w, ks, ke, relu=relu)
        for t, s in ((t, s) for t in range(len(q)) for s in range(len(k))):
            products = [q[t, j] @ k[s] for j in range(3)]
            want = sum(w[t, j] * (product.relu() if relu else product) for j, product in enumerate(products))
            assert logits[t, s] == (pytest.approx(want.item(), rel=1e-12) if ks[t] <= s < ke[t] else -torch.inf)


def chosen(row: list[float], ks: int, ke: int, topk: int) -> list[int]:
    return sorted(sorted(range(ks, ke), key=lambda s: (-row[s], s))[:topk])


@pytest.mark.parametrize("topk", [1, 4, 7, 30])
def test_selected_keys_with_ties(topk):
    torch.manual_seed(0)
    logits = (
        torch.randint(-1, 3, (40, 23)).double() * torch.tensor([1.0, -1.0]).repeat(20)[:, None]
    )  # zeros of both signs
    logits[::5] = torch.randn(8, 23).double()
    logits[3, 2:9] = -torch.inf
    ks = torch.randint(0, 12, (40,)).int()
    ke = torch.maximum(ks, torch.randint(0, 24, (40,)).int())
    ks[:10], ke[:10] = 0, 23
    found = select_topk(logits, ks, ke, topk)
    for t in range(40):
        want = chosen(logits[t].tolist(), int(ks[t]), int(ke[t]), topk)
        assert found.length[t] == len(want)
        assert found.indices[t].tolist() == want + [-1] * (topk - len(want))
        assert torch.equal(found.scores[t, : len(want)], logits[t, want])
        assert (found.scores[t, len(want) :] == -torch.inf).all()
    assert (found.length == 0).any()
    assert found.length.max() == min(topk, 23)


@SHAPES
def test_bits(rows):
    indices = rows.indices(holes=True)
    bits = selection_bits(indices, rows.keys).tolist()
    for t, row in enumerate(indices.tolist()):
        mask = sum(1 << s for s in row if 0 <= s < rows.keys)
        assert [word % 2**32 for word in bits[t]] == [mask >> 32 * n & 0xFFFFFFFF for n in range(len(bits[t]))]


@SHAPES
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_gradients_are_those_of_autograd(rows, relu):
    """Of `gather_scores`, and of the scores that `lightning_indexer` selects, some rows at a time."""
    given, indices, (ks, ke) = inputs(rows), rows.indices(holes=True), rows.bounds()
    assert_matches(
        lambda **x: gather_scores(**x, indices=indices, relu=relu),
        lambda **x: gather_truth(**x, indices=indices, relu=relu),
        given,
        RATIO[torch.float32],  # dw is rounded to w's dtype
    )
    assert_matches(
        lambda **x: lightning_indexer(**x, ks=ks, ke=ke, topk=rows.topk, relu=relu, chunk_rows=3),
        lambda **x: lightning_truth(**x, ks=ks, ke=ke, topk=rows.topk, relu=relu),
        given,
        RATIO[torch.float32],
    )


@pytest.mark.parametrize(
    ("rows", "relu"),
    [(ZOO[1], True), (ZOO[4], False), (ZOO[5], True)],
    ids=["odd", "context parallel", "rows that see nothing"],
)
def test_fp8_chooses_by_its_own_logits_and_scores_what_was_given(rows, relu):
    """Keys and heads of many magnitudes: without their scales the codes would choose others."""
    given, (ks, ke) = inputs(rows, torch.float32, 128), rows.bounds()
    k_size, q_size = torch.logspace(-2, 2, rows.keys)[:, None], torch.tensor([1.0, 100.0, 1e-2])[:, None]
    given = {"q": given["q"].detach() * q_size, "k": given["k"].detach() * k_size, "w": given["w"].detach()}
    q, k, w = given.values()
    (q8, q_scale), (k8, k_scale) = hadamard_quant(q), hadamard_quant(k)
    logits = indexer_logits(q8, k8, w * q_scale, ks, ke, relu=relu, k_scale=k_scale)
    truth = logits_truth(q.double(), k.double(), w, ks, ke, relu=relu)
    seen = truth.isfinite()
    assert torch.equal(seen, logits.isfinite())
    # e4m3 rounds each of the two by 2.6e-2: measured 0.027 to 0.075
    assert error_ratio(logits[seen], truth[seen]) < 0.1
    want = select_topk(logits, ks, ke, rows.topk)

    def fp8(op, **x):
        return op(**x, ks=ks, ke=ke, topk=rows.topk, relu=relu, fp8=True, chunk_rows=3)

    for op in (lightning_indexer, lightning_truth):
        found = fp8(op, **given)
        assert torch.equal(found.indices, want.indices)
        assert torch.equal(found.length, want.length)
    assert_matches(
        lambda **x: fp8(lightning_indexer, **x).scores,
        lambda **x: gather_truth(**x, indices=want.indices, relu=relu),
        {name: x.requires_grad_() for name, x in given.items()},
        RATIO[torch.float32],
    )


def test_fp8_of_other_widths_is_refused():
    with pytest.raises(ValueError, match="fp8=True rotates rows of 128 numbers, q and k have 5: leave fp8 out"):
        lightning_indexer(**inputs(PACKED), ks=PACKED.bounds()[0], ke=PACKED.bounds()[1], topk=4, fp8=True)


@pytest.mark.parametrize("dtype", RATIO, ids=str)
def test_dtypes(dtype):
    indices = PACKED.indices()
    given = inputs(PACKED, dtype)
    if dtype == torch.float64:
        given["w"] = given["w"].detach().double().requires_grad_()
    ratios = assert_matches(
        lambda **x: gather_scores(**x, indices=indices),
        lambda **x: gather_truth(**x, indices=indices),
        given,
        RATIO[dtype],
    )
    assert ratios["output 0"] <= RATIO[torch.float32]


def test_rows_without_keys_have_no_gradient_even_from_nan():
    rows = next(rows for rows in ZOO if rows.name == "rows that see nothing")
    given, (ks, ke) = inputs(rows), rows.bounds()
    found = lightning_indexer(**given, ks=ks, ke=ke, topk=rows.topk)
    assert found.length.tolist() == [0, 3, 3, 0, 3, 1, 0]
    grad = torch.randn_like(found.scores).masked_fill(found.indices < 0, torch.nan)
    dq, dk, dw = torch.autograd.grad(found.scores, list(given.values()), grad)
    assert not dq[found.length == 0].any()
    assert not dw[found.length == 0].any()
    assert dk.isfinite().all()
    assert dk.any()


def test_no_queries_no_keys_and_chunks_that_are_none():
    q, k, w, bound = torch.randn(0, 2, 4), torch.randn(5, 4), torch.randn(0, 2), torch.zeros(0, dtype=torch.int32)
    assert [x.shape for x in lightning_indexer(q, k, w, bound, bound, 3)] == [(0, 3), (0, 3), (0,)]
    q, w, bound = torch.randn(2, 2, 4, requires_grad=True), torch.randn(2, 2), torch.zeros(2, dtype=torch.int32)
    found = lightning_indexer(q, k[:0], w, bound, bound, 3)
    assert (found.indices == -1).all()
    found.scores.sum().backward()
    assert not q.grad.any()
    with pytest.raises(ValueError, match="chunk_rows=0 must be at least 1, or None"):
        lightning_indexer(q, k, w, bound, bound, 3, chunk_rows=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck clones its inputs
def test_ops_as_torch_wants_them():
    """Schemas, fake tensors, autograd registration and tracing: torch's own check of each op."""
    given, (ks, ke) = inputs(PACKED, torch.float32), PACKED.bounds()
    q, k, w = given.values()
    ops, plain = torch.ops.loongforge, [x.detach() for x in given.values()]
    for op, arguments in (
        (ops.indexer_logits, (*plain, ks, ke, True, None)),
        (ops.select_topk, (torch.randn(len(ks), PACKED.keys), ks, ke, 4)),
        (ops.lightning_indexer, (q, k, w, ks, ke, 4, True, 5, False, None)),
        (ops.gather_scores, (q, k, w, PACKED.indices(), True, True)),
        (ops.selection_bits, (PACKED.indices(), PACKED.keys)),
    ):
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("fp8", [False, True], ids=["", "fp8"])
def test_compiled_and_checkpointed_gradients_are_the_same(fp8):
    given, (ks, ke) = inputs(PACKED, torch.float32, 128), PACKED.bounds()

    def loss(q, k, w):
        scores = lightning_indexer(q * 2, k, w, ks, ke, PACKED.topk, fp8=fp8, chunk_rows=4).scores
        return scores.masked_fill(scores == -torch.inf, 0.0).square().sum()

    leaves = list(given.values())
    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for have in (compiled(*leaves), checkpoint(loss, *leaves, use_reentrant=False)):
        for one, other in zip(torch.autograd.grad(have, leaves), want, strict=True):
            assert torch.equal(one, other)
