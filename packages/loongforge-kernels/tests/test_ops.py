"""Every implementation of an op against its reference in fp64: forward and backward, odd shapes, unwritten memory."""

from __future__ import annotations

import pytest
import torch

from loongforge.kernels.cross_entropy import cross_entropy
from loongforge.kernels.cross_entropy.reference import cross_entropy as cross_entropy_truth
from loongforge.kernels.grouped_linear import grouped_linear
from loongforge.kernels.grouped_linear.grouped_mm import grouped_linear as grouped_mm_linear
from loongforge.kernels.grouped_linear.reference import grouped_linear as grouped_linear_truth
from loongforge.kernels.linear_cross_entropy import linear_cross_entropy
from loongforge.kernels.linear_cross_entropy.reference import linear_cross_entropy as linear_cross_entropy_truth
from loongforge.kernels.rms_norm import rms_norm
from loongforge.kernels.rms_norm.reference import rms_norm as rms_norm_truth
from loongforge.kernels.rope import rope
from loongforge.kernels.rope.reference import rope as rope_truth
from loongforge.kernels.swiglu import swiglu
from loongforge.kernels.swiglu.reference import swiglu as swiglu_truth
from loongforge.kernels.testing import assert_close, poison

# Measured over these shapes: fp32 at most 2e-7, bf16 at most 3.9e-3 (two roundings of 2^-9 each); allowed twice that.
RATIO = {torch.float32: 4e-7, torch.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", RATIO, ids=str)
SHAPES = [(1, 4), (3, 5), (7, 2, 60), (63, 1, 3, 33), (128, 256)]


def tensor(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def compare(op, truth, inputs, grad, ratio):
    """Outputs and gradients of `op` against `truth` on the same numbers in fp64, with torch.empty poisoned."""
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    with poison():
        y = op(*inputs)
        y.backward(grad.to(y.dtype))
    expected = truth(*wide)
    expected.backward(grad.to(y.dtype).double())
    assert_close("output", y, expected, ratio)
    for number, (x, x_wide) in enumerate(zip(inputs, wide, strict=True)):
        if x.requires_grad:
            assert x.grad.dtype == x.dtype
            assert_close(f"gradient {number}", x.grad, x_wide.grad, ratio)
    return y


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(shape, dtype):
    x, weight = tensor(*shape, dtype=dtype), tensor(shape[-1], dtype=dtype, seed=1)
    y = compare(
        lambda *a: rms_norm(*a, 1e-5),
        lambda *a: rms_norm_truth(*a, 1e-5),
        (x, weight),
        tensor(*shape, seed=2),
        RATIO[dtype],
    )
    assert y.dtype == dtype


def test_rms_norm_of_a_view_and_of_large_numbers():
    x = (tensor(6, 4, 10, dtype=torch.float32, scale=1e15)).detach().transpose(0, 1).requires_grad_()
    weight = tensor(10, dtype=torch.float32)
    compare(rms_norm, rms_norm_truth, (x, weight), tensor(4, 6, 10, seed=2), RATIO[torch.float32])


def test_rms_norm_with_one_frozen_input():
    x, weight = tensor(3, 8), tensor(8)
    for frozen in (x, weight):
        one, other = (x.detach(), weight) if frozen is x else (x, weight.detach())
        x.grad = weight.grad = None
        rms_norm(one, other).sum().backward()
        assert frozen.grad is None


@DTYPES
@pytest.mark.parametrize("shape", [(1, 2), (3, 10), (7, 2, 66), (64, 1536)], ids=str)
def test_swiglu(shape, dtype):
    grad = tensor(*shape[:-1], shape[-1] // 2, seed=2)
    y = compare(swiglu, swiglu_truth, (tensor(*shape, dtype=dtype),), grad, RATIO[dtype])
    assert y.dtype == dtype


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("columns", "pairs", "batch"), [(8, 4, 1), (10, 3, 1), (64, 32, 2), (2, 1, 2)])
@pytest.mark.parametrize("wide_angles", [False, True])
def test_rope(columns, pairs, batch, interleaved, dtype, wide_angles):
    x = tensor(5, 2, 3, columns, dtype=dtype)
    angle = tensor(5, batch, 1, pairs, seed=3).detach()
    angle_dtype = torch.float32 if wide_angles else dtype
    cos, sin = angle.cos().to(angle_dtype), angle.sin().to(angle_dtype)
    grad = tensor(5, 2, 3, columns, seed=2)
    compare(lambda *a: rope(*a, interleaved), lambda *a: rope_truth(*a, interleaved), (x, cos, sin), grad, RATIO[dtype])


def test_rope_turns_pairs_and_keeps_lengths():
    x = tensor(4, 1, 1, 6).detach()
    angle = torch.arange(4.0, dtype=torch.float64).view(4, 1, 1, 1) * torch.ones(3, dtype=torch.float64)
    y = rope(x, angle.cos(), angle.sin())
    assert torch.equal(y[0], x[0])
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones_like(angle), angle)
    assert torch.allclose(torch.complex(y[..., :3], y[..., 3:]), turned)


@DTYPES
@pytest.mark.parametrize(("tokens", "vocab"), [((1,), 2), ((3, 5), 7), ((64,), 1000), ((70,), 50021)], ids=str)
def test_cross_entropy(tokens, vocab, dtype):
    logits = tensor(*tokens, vocab, dtype=dtype, scale=3)
    labels = torch.randint(vocab, tokens, generator=torch.Generator().manual_seed(1))
    labels.view(-1)[::4] = -100
    grad = tensor(*tokens, seed=2)
    ratio = RATIO[dtype]
    if (vocab, dtype) == (50021, torch.float32):
        ratio = 9e-7  # a row's sum of 50021 exponentials, its order by the number of threads: 4.3e-7 with one
    y = compare(lambda x: cross_entropy(x, labels), lambda x: cross_entropy_truth(x, labels), (logits,), grad, ratio)
    assert y.dtype == torch.float32
    assert not y[labels == -100].any()
    assert not logits.grad[labels == -100].any()


def test_cross_entropy_where_the_model_is_sure():
    logits = torch.zeros(2, 4, dtype=torch.float32)
    logits[0, 1], logits[1, 1] = 7.0, 200.0  # right by far, wrong by far
    logits.requires_grad_()
    labels = torch.tensor([1, 2])
    compare(
        lambda x: cross_entropy(x, labels), lambda x: cross_entropy_truth(x, labels), (logits,), torch.ones(2), 1e-6
    )
    sure = 3 * torch.tensor(-7.0, dtype=torch.float64).exp()
    # one fp32 step near 1 is 6e-8, 2.2e-5 of this gradient; measured 5e-5
    assert logits.grad[0, 1].item() == pytest.approx((-sure / (1 + sure)).item(), rel=1e-4)


@DTYPES
@pytest.mark.parametrize("op", [grouped_linear, grouped_mm_linear], ids=["eager", "grouped_mm"])
@pytest.mark.parametrize("counts", [(5,), (3, 0, 7, 1), (0, 0), (64, 1, 63)], ids=str)
def test_grouped_linear(counts, op, dtype):
    x = tensor(sum(counts), 24, dtype=dtype)
    weights = [tensor(40, 24, dtype=dtype, seed=number + 1) for number in range(len(counts))]
    grad = tensor(sum(counts), 40, seed=9)
    y = compare(
        lambda x, *w: op(x, w, counts),
        lambda x, *w: grouped_linear_truth(x, w, counts),
        (x, *weights),
        grad,
        RATIO[dtype],
    )
    assert y.dtype == dtype


def test_grouped_linear_of_rows_that_no_kernel_takes():
    x, weights = tensor(5, 7, dtype=torch.float32), [tensor(3, 7, dtype=torch.float32, seed=one) for one in (1, 2)]
    compare(
        lambda x, *w: grouped_mm_linear(x, w, (2, 3)), lambda x, *w: grouped_linear_truth(x, w, (2, 3)), (x, *weights),
        tensor(5, 3, seed=9), RATIO[torch.float32],
    )  # fmt: skip


def test_grouped_linear_takes_views_and_leaves_out_what_is_frozen():
    x = tensor(24, 9, dtype=torch.float32).detach().t().requires_grad_()
    weights = [tensor(8, 24, dtype=torch.float32, seed=number) for number in (1, 2)]
    frozen = weights[1].requires_grad_(False)
    grouped_mm_linear(x, weights, (4, 5)).sum().backward()
    assert frozen.grad is None
    expected = torch.autograd.grad(grouped_linear_truth(x, weights, (4, 5)).sum(), (x, weights[0]))
    assert_close("x", x.grad, expected[0], 4e-7)
    assert_close("weight", weights[0].grad, expected[1], 4e-7)


LINEAR_CASES = [(1, 4, 3), (10, 5, 17), (70, 24, 1009)]


@DTYPES
@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
@pytest.mark.parametrize("block_bytes", [1, 64 << 20], ids=["many blocks", "one block"])
@pytest.mark.parametrize("weighted", ["uniform", "mask", "surprise"])
def test_linear_cross_entropy(case, dtype, block_bytes, weighted):
    tokens, hidden_size, vocab = case
    hidden = tensor(tokens, hidden_size, dtype=dtype)
    weight = tensor(vocab, hidden_size, dtype=dtype, seed=1, scale=0.3)
    labels = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(1))
    labels[1::5] = -100
    mask = (torch.arange(tokens) % 3 != 1).float()
    grad = {
        "uniform": torch.full((tokens,), 0.37),
        "mask": mask / mask.sum(),
        "surprise": tensor(tokens, seed=4).detach(),
    }
    # bf16 logits are rounded once before the loss, as in the plain form: 2^-9 of a logit, measured 5e-3 at most
    ratio = {torch.float32: 1e-6, torch.bfloat16: 1.2e-2}[dtype]
    y = compare(
        lambda h, w: linear_cross_entropy(h, w, labels, mask if weighted == "mask" else None, block_bytes=block_bytes),
        lambda h, w: linear_cross_entropy_truth(h, w, labels),
        (hidden, weight),
        grad[weighted],
        ratio,
    )
    assert y.dtype == torch.float32


def test_linear_cross_entropy_computes_only_what_is_asked():
    hidden, weight = tensor(6, 4), tensor(9, 4, seed=1)
    labels = torch.arange(6)
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad
    linear_cross_entropy(hidden, weight.detach(), labels).sum().backward()
    assert weight.grad is None
    expected = torch.autograd.grad(linear_cross_entropy_truth(hidden, weight, labels).sum(), hidden)[0]
    assert_close("hidden", hidden.grad, expected, 1e-12)
    linear_cross_entropy(hidden.detach(), weight, labels).sum().backward()
    assert weight.grad is not None


def test_linear_cross_entropy_runs_backward_twice():
    hidden, weight = tensor(6, 4), tensor(9, 4, seed=1)
    loss = linear_cross_entropy(hidden, weight, torch.arange(6)).sum() * 2
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    assert_close("weight", weight.grad, 2 * once, 1e-12)


def test_a_broken_promise_is_seen_in_every_gradient():
    """Kept, it changes nothing: by the same weights, by 0 for all, and by weights that are 0 for all."""
    hidden, weight, mask = tensor(6, 4), tensor(9, 4, seed=1), torch.tensor([0.0, 1, 1, 3, 1, 0])

    def gradients(token_weight: torch.Tensor, grad: torch.Tensor, **named: bool) -> tuple[torch.Tensor, ...]:
        loss = linear_cross_entropy(hidden, weight, torch.arange(6), token_weight, **named)
        return torch.autograd.grad(loss, (hidden, weight), grad.double())

    for factor, grad in ((mask, 0.3 * mask), (mask, 0 * mask), (0 * mask, 0 * mask)):
        for have, want in zip(gradients(factor, grad, proportional=True), gradients(factor, grad), strict=True):
            assert torch.equal(have, want)
    for factor, grad in ((mask, mask + 1e-3), (0 * mask, mask)):
        assert all(have.isnan().all() for have in gradients(factor, grad, proportional=True))


def test_a_mask_of_zeros_has_no_gradient():
    hidden, weight = tensor(6, 4), tensor(9, 4, seed=1)
    mask = torch.zeros(6)
    (linear_cross_entropy(hidden, weight, torch.arange(6), mask) * mask).sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        (rms_norm, (tensor(3, 5), tensor(5, seed=1))),
        (swiglu, (tensor(3, 6),)),
        (
            lambda x: rope(x, torch.full((3, 1, 1, 2), 0.6).double(), torch.full((3, 1, 1, 2), 0.8).double()),
            (tensor(3, 1, 2, 5),),
        ),
        (lambda x: cross_entropy(x, torch.tensor([1, -100, 0])), (tensor(3, 4),)),
        (
            lambda h, w: linear_cross_entropy(h, w, torch.tensor([1, -100, 0]), block_bytes=1),
            (tensor(3, 4), tensor(5, 4)),
        ),
    ],
    ids=["rms_norm", "swiglu", "rope", "cross_entropy", "linear_cross_entropy"],
)
def test_gradcheck(op, inputs):
    assert torch.autograd.gradcheck(op, inputs)
