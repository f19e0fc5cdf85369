"""`dsa` by the kernels that megatron-core 0.19 brings in: TileLang's (Apache-2.0) or cuDNN's with FlashMLA.

Called through megatron-core's own hooks (`experimental_attention_variant/dsa_kernels.py`), which take absorbed queries
and choose between equal scores as each backend does; which shapes they take is theirs to say.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loongforge.kernels.dsa import Attended, absorb

_HOOKS = "megatron.core.transformer.experimental_attention_variant.dsa_kernels"
_BLOCK = 8192
"""Queries whose scores are made at a time: what megatron-core's attention asks for."""


def tilelang_dsa(*arguments: Any, **named: Any) -> Attended:
    """As `loongforge.kernels.dsa.dsa`; see `sparse_attention` for what is refused."""
    return sparse_attention("tilelang", *arguments, **named)


def cudnn_dsa(*arguments: Any, **named: Any) -> Attended:
    """As `loongforge.kernels.dsa.dsa`; see `sparse_attention` for what is refused."""
    return sparse_attention("cudnn", *arguments, **named)


def sparse_attention(
    backend: str, q: Tensor, kv: Tensor, up: Tensor, index: tuple[Tensor, Tensor, Tensor] | None, ks: Tensor,
    ke: Tensor, *, topk: int, scale: float, indices: Tensor | None = None, kl: str | None = "mean",
    tp_group: dist.ProcessGroup | None = None, **others: Any,
) -> Attended:  # fmt: skip
    """Attention of q to the keys its indexer chose, by a `dsa_kernel_backend` of megatron-core.

    Raises ValueError for arguments of `dsa` that a backend has no place for (a route, weights of rows, a fixed order of
    sums, a loss over a given choice), RuntimeError where the backend declines the shapes.
    """
    _check(index, indices, kl, others)
    latent, nope = up.shape[2], q.shape[2] - kv.shape[1] + up.shape[2]
    config = SimpleNamespace(dsa_kernel_backend=backend, attention_backend="auto", kv_lora_rank=latent)
    query, key = absorb(q, up[:, :nope])[:, None], kv[:, None, None]
    hooks, length, loss = import_module(_HOOKS), None, None
    if indices is not None:
        chosen = indices[None]
    else:
        assert index is not None, "checked above"
        scored = (config, *_batched(index), topk, ks, ke, _BLOCK)
        if kl is None:
            chosen, length = _given(backend, hooks.run_fused_qk_topk(*scored))
        else:
            chosen, length, loss = _given(
                backend,
                hooks.run_fused_qk_topk_with_loss(
                    *scored, query=query.detach(), key=key.detach(), softmax_scale=scale, loss_coeff=1.0,
                    pg_collection=SimpleNamespace(tp=tp_group or Alone()), calculate_per_token_loss=kl == "sum",
                ),
            )  # fmt: skip
    found = hooks.run_fused_absorbed_sparse_attention(config, query, key, chosen, scale, latent, length)
    out = torch.einsum("thc,hvc->thv", _given(backend, found)[:, 0], up[:, nope:])
    return Attended(out, loss, chosen[0].int())


class Alone:
    """A process group of one, as far as megatron-core asks."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _batched(index: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The indexer's queries, keys and weights with a batch of one behind the first dimension."""
    query, key, weights = index
    return query[:, None], key[:, None], weights[:, None]


def _check(index: object, indices: object, kl: str | None, others: dict[str, Any]) -> None:
    if index is None and indices is None:
        raise ValueError("dsa without an index needs the indices of another layer and kl=None")
    if kl not in (None, "mean", "sum") or (kl is not None and indices is not None):
        raise ValueError(f"dsa: megatron-core's kernels have no loss {kl!r} over a given choice or by row: kl=None.")
    unknown = {name: value for name, value in others.items() if value and name not in ("longest", "speeds")}
    if unknown:
        said = ", ".join(f"{name}={value!r}" for name, value in unknown.items())
        raise ValueError(f"dsa: megatron-core's kernels have no place for {said}: take impl='composed'.")


def _given(backend: str, result: Any) -> Any:
    if result is None:
        raise RuntimeError(f"megatron-core's backend {backend!r} declined these shapes")
    return result
