"""What one would use for sparse attention without this wheel, as calls on the benchmark's inputs.

Each returns the output `[T, H, value]` and the indexer's loss (None where it has none), differentiable like ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loongforge.kernels.bench.dsa_inputs import Inputs
from loongforge.kernels.peers.megatron import Alone, sparse_attention

Attention = Callable[[Inputs], tuple[Tensor, Tensor | None]]

_MEGATRON = "megatron.core.transformer.experimental_attention_variant"


def expanded(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Keys `[T, H, nope + rope]` and values `[T, H, value]` of every head."""
    dims = inputs.dims
    wide = torch.einsum("sc,hnc->shn", inputs.kv[:, : dims.latent], inputs.up)
    rope = inputs.kv[:, None, dims.latent :].expand(-1, inputs.up.shape[0], -1)
    return torch.cat((wide[..., : dims.nope], rope), -1), wide[..., dims.nope :]


def dense(inputs: Inputs) -> tuple[Tensor, None]:
    """Causal attention to every key, torch's fastest: no choice, no indexer. Values are padded where it demands it."""
    key, value = expanded(inputs)
    query, key, value = (x.transpose(0, 1)[None] for x in (inputs.q, key, value))
    width = value.shape[-1]
    if query.is_cuda:
        value = F.pad(value, (0, query.shape[-1] - width)) if width < query.shape[-1] else value
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=inputs.scale)
    return out[0, ..., :width].transpose(0, 1), None


def unfused(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """megatron-core with `dsa_kernel_backend="none"`: its indexer with loss, and its attention in torch."""
    dsa = _module("dsa")
    key, value = expanded(inputs)
    query, key, value = (x[:, None] for x in (inputs.q, key, value))
    index_q, index_k, index_w = (x[:, None] for x in inputs.index)
    length = len(inputs.q)
    mask = torch.full((length, length), float("-inf"), device=query.device).triu(1)
    indices, loss = dsa.FusedDSAIndexerLoss.apply(
        index_q,
        index_w,
        index_k,
        query.detach(),
        key.detach(),
        inputs.scale,
        inputs.topk,
        1.0,
        mask,
        True,
        SimpleNamespace(tp=Alone()),
    )
    out = dsa.unfused_dsa_fn(query, key, value, indices, inputs.scale, mask=mask)
    return out[:, 0].unflatten(-1, inputs.grad.shape[1:]), loss


def by_backend(inputs: Inputs, backend: str) -> tuple[Tensor, Tensor | None]:
    """megatron-core with one of its `dsa_kernel_backend`s, on absorbed queries."""
    _module("dsa_kernels")
    found = sparse_attention(
        backend, inputs.q, inputs.kv, inputs.up, inputs.index, inputs.ks, inputs.ke, topk=inputs.topk,
        scale=inputs.scale,
    )  # fmt: skip
    return found.out, found.kl


def _module(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what megatron-core says about packages that it would like to have
        return import_module(f"{_MEGATRON}.{name}")


PEERS: dict[str, Attention] = {
    "megatron-core, unfused": unfused,
    "megatron-core, tilelang": partial(by_backend, backend="tilelang"),
    "megatron-core, cudnn": partial(by_backend, backend="cudnn"),
    "torch, dense causal": dense,
}
