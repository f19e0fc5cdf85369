"""Ops of one output, forward and backward, against plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from loongforge.kernels.bench.timing import Row, in_turns
from loongforge.kernels.packed_attention import Parts
from loongforge.kernels.registry import Registry
from loongforge.kernels.rms_norm.reference import rms_norm as plain_rms_norm
from loongforge.kernels.rope.reference import rope as plain_rope
from loongforge.kernels.testing import assert_close

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Error ratio that gradients of two rivals may differ by: rounding of the dtype at the lengths of `cases`."""

Op = Callable[..., Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Rivals on the same inputs."""

    name: str
    inputs: tuple[Tensor, ...]
    """Leaves that want gradients."""
    rivals: dict[str, Op]
    """The plain one first; each takes the inputs."""


def cases(op: str, device: torch.device, dtype: torch.dtype, kernels: Registry) -> Iterator[Case]:
    """Every case of an op; sizes of one layer on a GPU, of a small one on a CPU."""

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_()

    tokens = 16384 if device.type == "cuda" else 1024
    ours = kernels.op(op)
    if op == "rms_norm":
        for shape in ((tokens // 4, 256), (tokens, 4096)):
            yield Case(
                name=f"rms_norm {shape}",
                inputs=(leaf(*shape), leaf(shape[-1])),
                rivals={
                    "plain": plain_rms_norm,
                    "torch": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
                    "ours": ours,
                },
            )
    elif op == "swiglu":
        for shape in ((tokens, 1536), (tokens, 8192)):
            yield Case(name=f"swiglu {shape}", inputs=(leaf(*shape),), rivals={"plain": plain_swiglu, "ours": ours})
    elif op == "rope":
        for shape in ((tokens // 4, 1, 32, 128), (tokens // 4, 2, 4, 64)):
            angle = torch.rand(shape[0], 1, 1, shape[-1] // 2, device=device)
            turns = angle.cos().to(dtype), angle.sin().to(dtype)
            yield Case(
                name=f"rope {shape}",
                inputs=(leaf(*shape),),
                rivals={"plain": lambda x, t=turns: plain_rope(x, *t), "ours": lambda x, t=turns: ours(x, *t)},
            )
    elif op == "cross_entropy":
        for vocab in (1000, 32000):
            labels = torch.randint(vocab, (tokens // 2,), device=device)
            yield Case(
                name=f"cross_entropy {(tokens // 2, vocab)}",
                inputs=(leaf(tokens // 2, vocab),),
                rivals={
                    "plain": lambda x, y=labels: F.cross_entropy(x.float(), y, reduction="none"),
                    "ours": lambda x, y=labels: ours(x, y),
                },
            )
    elif op == "packed_attention":
        yield from _packed_cases(leaf(tokens, 16, 64), leaf(tokens, 8, 64), leaf(tokens, 8, 64), ours)
    else:
        for hidden, vocab in ((256, 8192), (768, 32000)):
            labels = torch.randint(vocab, (tokens // 2,), device=device)
            yield Case(
                name=f"linear_cross_entropy {(tokens // 2, hidden, vocab)}",
                inputs=(leaf(tokens // 2, hidden), leaf(vocab, hidden, scale=0.02)),
                rivals={
                    "plain": lambda h, w, y=labels: F.cross_entropy(F.linear(h, w).float(), y, reduction="none"),
                    "ours": lambda h, w, y=labels: ours(h, w, y),
                },
            )


OPS = ("rms_norm", "swiglu", "rope", "cross_entropy", "linear_cross_entropy", "packed_attention", "adamw")
"""What `measure` knows."""


def measure(op: str, device: torch.device, dtype: torch.dtype, kernels: Registry, repeat: int) -> Iterator[Row]:
    """Rows of one op."""
    if op == "adamw":
        for millions in (7, 100):
            yield from _adamw(millions, device, dtype, kernels.choose(op, device, dtype).call, repeat)
        return
    for case in cases(op, device, dtype, kernels):
        yield from compare(case, device, repeat)


def _adamw(
    millions: int, device: torch.device, dtype: torch.dtype, ours: Callable[..., object], repeat: int
) -> Iterator[Row]:
    """One step of torch's three forms and ours, on matrices and vectors of a transformer."""
    shapes = [(768, 768), (3072, 768), (768,)] * max(1, millions * 1_000_000 // (768 * 768 * 5))
    parameters = [torch.nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    data, grads = [p.data for p in parameters], [p.grad for p in parameters]
    first, second = ([torch.zeros_like(p) for p in data] for _ in range(2))
    calls: dict[str, Callable[[], object]] = {
        "torch": torch.optim.AdamW(parameters, foreach=False, fused=False).step,
        "torch, foreach": torch.optim.AdamW(parameters, foreach=True, fused=False).step,
        "torch, fused": torch.optim.AdamW(parameters, foreach=False, fused=True).step,
        "ours": lambda: ours(data, grads, first, second, step=1, lr=1e-3),
    }
    for rival, timing in in_turns(calls, device, repeat).items():
        yield Row(case=f"adamw {millions}M", what="both", rival=rival, timing=timing)


def plain_swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up with torch's autograd."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _packed_cases(query: Tensor, key: Tensor, value: Tensor, ours: Op) -> Iterator[Case]:
    """Rows of a few documents and of many."""
    (tokens, heads, width), groups = query.shape, key.shape[1]
    for documents in (4, 64):
        parts = _documents(tokens, documents, query.device)
        yield Case(
            name=f"packed_attention {tokens} tokens, {documents} documents, {heads} and {groups} heads of {width}",
            inputs=(query, key, value),
            rivals={
                "a slice for each": lambda q, k, v, p=parts: plain_packed_attention(q, k, v, p),
                "torch, one mask": lambda q, k, v, p=parts: masked_attention(q, k, v, p),
                "ours": lambda q, k, v, p=parts: ours(q, k, v, p, width**-0.5),
            },
        )


def plain_packed_attention(query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Tensor:
    """torch's attention of one document after the other."""
    outputs, start = [], 0
    for length in parts.queries:
        part = slice(start, start + length)
        q, k, v = (tensor[part].transpose(0, 1)[None] for tensor in (query, key, value))
        outputs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
        start += length
    return torch.cat(outputs)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, parts: Parts) -> Tensor:
    """torch's attention of the whole row under a mask `[T, T]`, as is usual where no kernel knows lengths."""
    number = torch.bucketize(torch.arange(len(query), device=query.device), parts.query_ends[1:], right=True)
    seen = (number[:, None] == number).tril_()
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)


def _documents(tokens: int, count: int, device: torch.device) -> Parts:
    """`count` lengths, log-normal with sigma 1, that add up to `tokens`."""
    weights = torch.exp(torch.randn(count, generator=torch.Generator().manual_seed(count)))
    ends = (weights.cumsum(0) / weights.sum() * (tokens - count)).round().long() + torch.arange(1, count + 1)
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64)).tolist()
    return Parts.of(lengths, lengths, device)


def compare(case: Case, device: torch.device, repeat: int) -> list[Row]:
    """Check the gradients of all rivals, then measure a forward and backward pass of each."""

    def once(call: Op) -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(*case.inputs).mean(), case.inputs)

    expected = once(next(iter(case.rivals.values())))
    for rival, call in case.rivals.items():
        for have, want in zip(once(call), expected, strict=True):
            assert_close(f"{case.name}, {rival}", have, want, TOLERANCES[have.dtype])
    times = in_turns({rival: (lambda call=call: once(call)) for rival, call in case.rivals.items()}, device, repeat)
    return [Row(case=case.name, what="both", rival=rival, timing=timing) for rival, timing in times.items()]
