"""Sparse attention with its indexer and loss: checked against fp64, then its parts and the whole against peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import torch
from torch import Tensor

from loongforge.kernels.attention_target import attention_target
from loongforge.kernels.bench.dsa_inputs import Dims, Inputs, make, tflop
from loongforge.kernels.bench.dsa_peers import PEERS, Attention, dense, expanded
from loongforge.kernels.bench.timing import Ceilings, Row, in_turns
from loongforge.kernels.dsa import Route, Speeds, dsa
from loongforge.kernels.gather_scores import gather_scores
from loongforge.kernels.indexer_logits import indexer_logits
from loongforge.kernels.lightning_indexer import lightning_indexer
from loongforge.kernels.masked_mha import masked_mha
from loongforge.kernels.select_topk import select_topk
from loongforge.kernels.selection_bits import selection_bits
from loongforge.kernels.sparse_mla import sparse_mla
from loongforge.kernels.testing import assert_close, error_ratio

CHECKED = 256
"""Tokens of the check against fp64, whose reference runs on the CPU."""
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Error ratio of output, loss and gradients; half precision keeps 8 or 11 bits of queries, keys and probabilities.
A wrong row or head is off by 0.1 or more."""
ROWS = 1024
"""Queries of the logits that are ranked alone: the last ones, which see the most."""
ROUTES: tuple[Route, ...] = ("masked", "gather")
RESULTS = ("output", "loss", *(f"gradient of {name}" for name in ("q", "kv", "up", "index q", "index k", "index w")))


def check(dims: Dims, heads: int, device: torch.device, dtype: torch.dtype, peers: Sequence[str]) -> dict[str, str]:
    """Every route against fp64: AssertionError names what is wrong. How far each peer is off, in words."""
    inputs = make(dims, CHECKED, heads, CHECKED // 4, device, dtype)
    truth = inputs.wide()
    chosen = lightning_indexer(*truth.index, truth.ks, truth.ke, truth.topk).indices
    expected = _gradients(partial(_ours, route="masked", indices=chosen), truth)
    for route in ROUTES:
        found = _gradients(partial(_ours, route=route, indices=chosen.to(device)), inputs)
        for name, have, want in zip(RESULTS, found, expected, strict=True):
            assert_close(f"{route}, {name}", have.cpu(), want, TOLERANCES[dtype])
    mine = lightning_indexer(*inputs.index, inputs.ks, inputs.ke, inputs.topk).indices.cpu()
    same = (mine.sort(-1).values == chosen.sort(-1).values).double().mean().item()
    assert same > (0.999 if dtype == torch.float32 else 0.97), f"only {same:.1%} of the chosen keys are those of fp64"
    return {name: _error(PEERS[name], inputs, expected) for name in peers}


def _error(peer: Attention, inputs: Inputs, expected: list[Tensor]) -> str:
    """Of a peer that chooses and attends for itself; one that attends to every key computes something else."""
    try:
        found = _gradients(peer, inputs)
    except Exception:  # noqa: BLE001 - another project's code may raise anything; the measurement says what
        return ""
    worst = max(error_ratio(have.cpu(), want) for have, want in zip(found, expected, strict=True))
    return "another result" if peer is dense else f"off by {worst:.1g}"


def measure(inputs: Inputs, case: str, repeat: int, errors: Mapping[str, str]) -> Iterator[Row]:
    """Parts, then the whole core by every route and peer; `errors` is what `check` found."""
    with torch.no_grad():
        indices = lightning_indexer(*inputs.index, inputs.ks, inputs.ke, inputs.topk).indices
    yield from _indexing(inputs, case, repeat)
    yield from _attending(inputs, indices, case, repeat)
    yield from _moving(inputs, indices, case, repeat)
    for route in ROUTES:
        yield _whole(inputs, case, f"ours, {route}", partial(_ours, route=route), repeat)
    for name, error in errors.items():
        row = _whole(inputs, case, name, PEERS[name], repeat)
        yield replace(row, note=row.note or error)


def speeds(rows: Sequence[Row], limits: Ceilings) -> Speeds:
    """The table that `dsa.plan` takes, out of a report of one shape."""
    rates = {(row.rival, row.what): row.rate or 0.0 for row in rows}
    return Speeds(
        device=limits.device,
        source=f"measured {datetime.now(UTC).date().isoformat()}, torch {torch.__version__}",
        masked_forward=rates["masked_mha", "forward"],
        masked_backward=rates["masked_mha", "backward"],
        gather_forward=rates["sparse_mla", "forward"],
        gather_backward=rates["sparse_mla", "backward"],
        projection=limits.matmul,
        gather_bytes=rates["index_select", "rows"],
        add_bytes=rates["index_add", "rows"],
    )


def _ours(x: Inputs, route: Route, indices: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    found = dsa(
        x.q, x.kv, x.up, x.index, x.ks, x.ke, topk=x.topk, scale=x.scale, route=route, indices=indices, kl="mean"
    )
    return found.out, found.kl


def _gradients(attention: Attention, inputs: Inputs) -> list[Tensor]:
    """Output, loss, and the gradients of the leaves; None stands as zeros."""
    out, loss = attention(inputs)
    total = (out * inputs.grad).sum() if loss is None else (out * inputs.grad).sum() + loss
    grads = torch.autograd.grad(total, inputs.leaves, allow_unused=True, materialize_grads=True)
    return [out.detach(), out.new_zeros(()) if loss is None else loss.detach(), *grads]


def _whole(inputs: Inputs, case: str, name: str, attention: Attention, repeat: int) -> Row:
    """Forward and backward of everything; a peer that cannot run says why."""
    device = inputs.q.device
    try:
        timing = in_turns({name: lambda: _gradients(attention, inputs)}, device, repeat)[name]
        return Row(case=case, what="both", rival=name, timing=timing)
    except Exception as problem:  # another project's code may raise anything; the row says what, the others go on
        if name.startswith("ours"):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return Row(case=case, what="both", rival=name, timing=None, note=" ".join(str(problem).split())[:160])


def _indexing(inputs: Inputs, case: str, repeat: int) -> Iterator[Row]:
    """The choice: logits and ranking of the last queries, then everything."""
    device, length = inputs.q.device, len(inputs.q)
    q, k, w = (x.detach() for x in inputs.index)
    last = slice(max(0, length - ROWS), length)
    ks, ke = inputs.ks[last], inputs.ke[last]
    logits = indexer_logits(q[last], k, w[last], ks, ke)
    topk = min(inputs.topk, length)
    ranked = in_turns(
        {
            "select_topk": lambda: select_topk(logits, ks, ke, topk),
            "torch.topk": lambda: logits.topk(topk),
            "one read of the logits": lambda: logits.sum(),
        },
        device,
        repeat,
    )
    for name, timing in ranked.items():
        yield Row(case=case, what=f"{len(logits)} rows", rival=name, timing=timing)
    yield from _both_ways(
        case, "lightning_indexer", lambda: lightning_indexer(*inputs.index, inputs.ks, inputs.ke, topk).scores,
        inputs.index, (tflop(inputs, "indexer"), tflop(inputs, "indexer backward")), repeat,
    )  # fmt: skip


def _attending(inputs: Inputs, indices: Tensor, case: str, repeat: int) -> Iterator[Row]:
    """Attention by either route, and what teaches the indexer."""
    device, dims = inputs.q.device, inputs.dims
    with torch.no_grad():
        bits = selection_bits(indices, len(inputs.kv))
        wide = torch.einsum("thn,hnc->thc", inputs.q[..., : dims.nope], inputs.up[:, : dims.nope])
    absorbed = torch.cat((wide, inputs.q.detach()[..., dims.nope :]), -1).requires_grad_()
    key, value = (x.detach().requires_grad_() for x in expanded(inputs))
    yield from _both_ways(
        case, "masked_mha", lambda: masked_mha(inputs.q, key, value, bits, inputs.ks, inputs.ke, inputs.scale)[0],
        (inputs.q, key, value), (tflop(inputs, "masked"), tflop(inputs, "masked backward")), repeat,
    )  # fmt: skip
    for name, exact in (("sparse_mla", False), ("sparse_mla, deterministic", True)):
        yield from _both_ways(
            case, name,
            lambda exact=exact: sparse_mla(
                absorbed, inputs.kv, indices, scale=inputs.scale, d_v=dims.latent, deterministic=exact
            )[0],
            (absorbed, inputs.kv), (tflop(inputs, "gather"), tflop(inputs, "gather backward")), repeat,
        )  # fmt: skip
    index_q, index_k, index_w = (x.detach() for x in inputs.index)
    with torch.no_grad():
        lse = sparse_mla(absorbed, inputs.kv, indices, scale=inputs.scale, d_v=dims.latent)[1]
    timing = in_turns(
        {
            "attention_target": lambda: attention_target(absorbed, inputs.kv, indices, lse, scale=inputs.scale),
            "gather_scores": lambda: gather_scores(index_q, index_k, index_w, indices),
        },
        device,
        repeat,
    )
    work = {"attention_target": tflop(inputs, "target"), "gather_scores": tflop(inputs, "indexer backward") / 3}
    for name, one in timing.items():
        yield Row(case=case, what="forward", rival=name, timing=one, work=work[name])


def _moving(inputs: Inputs, indices: Tensor, case: str, repeat: int) -> Iterator[Row]:
    """Rows of chosen keys read, and gradients of them added in fp32: what limits the route `gather` at few heads."""
    kv = inputs.kv.detach()
    rows = indices[-ROWS:].clamp_min(0).flatten().long()
    read, grads = kv.index_select(0, rows), torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
    added = read.float()
    timings = in_turns(
        {"index_select": lambda: kv.index_select(0, rows), "index_add": lambda: grads.index_add_(0, rows, added)},
        kv.device,
        repeat,
    )
    work = {"index_select": 1e-12 * read.nbytes, "index_add": 1e-12 * added.nbytes}  # a row's one passage
    for name, timing in timings.items():
        yield Row(case=case, what="rows", rival=name, timing=timing, work=work[name], unit="TB")


def _both_ways(
    case: str, name: str, call: Callable[[], Tensor], leaves: tuple[Tensor, ...], work: tuple[float, float], repeat: int
) -> Iterator[Row]:
    """The forward pass without gradients, and the backward pass of a kept one."""
    out = call()
    grad = torch.randn_like(out).masked_fill_(out.isinf(), 0.0)

    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    calls = {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True),
    }
    timings = in_turns(calls, out.device, repeat)
    for (what, timing), tera in zip(timings.items(), work, strict=True):
        yield Row(case=case, what=what, rival=name, timing=timing, work=tera)
