"""A backend for DeepSeek Sparse Attention in megatron-core 0.19: `TransformerConfig(dsa_kernel_backend="loongforge")`.

`register()` first. megatron-core then calls the functions of this module in place of its unfused ones; a function that
returns None leaves the work to them: what a GPU's kernels do not take (`sparse_mla` says what), and what each function
names. Results and gradients are those of the unfused functions, but scores of all pairs never exist at once, and equal
scores choose the lowest key, so that ranks and recomputed layers agree. megatron-core's configuration asks for a CUDA
device with any backend.

Shapes are megatron-core's: S queries and K keys of B sequences, H heads, top-k as int32 `[B, S, topk]`, -1 where there
are fewer. Which keys a query may see is in `starts` and `ends`, so packing and context parallelism need nothing else,
and the hints that come along are not read.

Why: megatron-core's backends are two names in a private table. How: a third name in it, and in the list that its
configuration checks. Upstream: experimental_attention_variant/dsa_kernels.py, core/utils.py. Remove when: backends can
be registered.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor

from loongforge.kernels.attention_target import attention_target
from loongforge.kernels.indexer_kl import indexer_kl
from loongforge.kernels.lightning_indexer import Selection, lightning_indexer
from loongforge.kernels.masked_mha import masked_mha
from loongforge.kernels.selection_bits import selection_bits
from loongforge.kernels.sparse_mla import sparse_mla

NAME = "loongforge"
"""What a user writes as `dsa_kernel_backend`."""
TESTED = (0, 19)
"""Version of megatron-core whose private names these are."""


def register() -> None:
    """Add this backend to megatron-core; once for a process, or again.

    Raises RuntimeError where megatron-core is not the tested version, or its private names are not what they were.
    """
    try:
        have = version("megatron-core")
    except PackageNotFoundError:
        raise RuntimeError("megatron-core is not installed: pip install 'megatron-core>=0.19,<0.20'.") from None
    wanted = ".".join(map(str, TESTED))
    if Version(have).release[:2] != TESTED:
        raise RuntimeError(
            f"megatron-core {have} keeps its DSA backends in private names, known for {wanted} alone: install "
            f"'megatron-core=={wanted}.*', or set dsa_kernel_backend to 'none'."
        )
    from megatron.core import utils
    from megatron.core.transformer.experimental_attention_variant import dsa_kernels

    modules = getattr(dsa_kernels, "_BACKEND_MODULE_NAME_BY_BACKEND", None)
    names = getattr(utils, "_VALID_DSA_KERNEL_BACKENDS", None)
    if not isinstance(modules, dict) or not isinstance(names, tuple):
        raise RuntimeError(
            f"megatron-core {have} has no table of DSA backends where {wanted}.2 has it: set dsa_kernel_backend to "
            f"'none', or install megatron-core {wanted}.2."
        )
    modules[NAME] = __name__
    if NAME not in names:
        setattr(utils, "_VALID_DSA_KERNEL_BACKENDS", (*names, NAME))  # noqa: B010 - a private name of another library


def run_fused_qk_topk(
    q: Tensor, k: Tensor, weights: Tensor, index_topk: int, starts: Tensor, ends: Tensor, block_size: int,
    use_relu: bool = True, **hints: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Top-k from q `[S, B, HI, DI]`, k `[K, B, DI]`, weights `[S, B, HI]`; starts and ends int32 `[S]`."""
    with torch.no_grad():
        found = _choose(q, k, weights, index_topk, starts, ends, use_relu)
    return torch.stack([one.indices for one in found]), None


def run_fused_qk_topk_with_loss(
    q: Tensor, k: Tensor, weights: Tensor, index_topk: int, starts: Tensor, ends: Tensor, block_size: int,
    query: Tensor, key: Tensor, softmax_scale: float, loss_coeff: float, pg_collection: Any,
    query_valid_rows: Tensor | None = None, calculate_per_token_loss: bool = False, use_relu: bool = True, *,
    config: Any, **hints: Any,
) -> tuple[Tensor, None, Tensor] | None:  # fmt: skip
    """Top-k, and the loss of the indexer over it from absorbed query `[S, B, H, D]` and key `[K, B, 1, D]`.

    None where key has a head for each of query: the target is computed from absorbed queries.
    """
    latent = config.kv_lora_rank or 0
    if key.size(2) != 1 or not latent or not _fits(query, latent):
        return None
    found = _choose(q, k, weights, index_topk, starts, ends, use_relu)
    attended = [
        _attend(one_query, one_key, one.indices, softmax_scale, latent)[1]
        for one_query, one_key, one in zip(query.unbind(1), key.unbind(1), found, strict=True)
    ]
    loss = _loss(
        query, key, found, attended, softmax_scale, loss_coeff, pg_collection, query_valid_rows,
        calculate_per_token_loss,
    )  # fmt: skip
    return torch.stack([one.indices for one in found]), None, loss


def run_fused_absorbed_sparse_attention(
    query: Tensor, key: Tensor, topk_indices: Tensor, softmax_scale: float, v_channels: int,
    topk_length: Tensor | None = None,
) -> Tensor | None:  # fmt: skip
    """Output `[S, B, H, v_channels]` from absorbed query `[S, B, H, D]`, key `[K, B, 1, D]` and top-k."""
    if not _fits(query, v_channels):
        return None
    chosen = topk_indices.int()
    if topk_length is not None:
        column = torch.arange(chosen.size(-1), device=chosen.device)
        chosen = chosen.masked_fill(column >= topk_length[..., None], -1)
    rows = zip(query.unbind(1), key.unbind(1), chosen, strict=True)
    return torch.stack([_attend(*row, softmax_scale, v_channels)[0] for row in rows], 1)


def run_fused_dsa_attention(
    *, query: Tensor, key: Tensor, value: Tensor | None, up_v_weight: Tensor | None, q_indexer: Tensor,
    k_indexer: Tensor, indexer_weights: Tensor, indexer_topk: int, softmax_scale: float, loss_coeff: float,
    sparse_loss: bool, calculate_per_token_loss: bool, absorbed_mla: bool, varlen_starts: Tensor | None,
    varlen_ends: Tensor | None, key_positions: Tensor | None, query_valid_rows: Tensor | None, use_relu: bool,
    pg_collection: Any = None, **hints: Any,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Output `[S, B, H * V]` and the indexer's loss, 0 without a coefficient; absorbed, or with keys of every head.

    None for keys in another order, for a mask that is not a range of keys, for the loss over all keys, and for a loss
    where keys have heads.
    """
    if varlen_starts is None or varlen_ends is None or key_positions is not None:
        return None
    absorbed = absorbed_mla and value is None and up_v_weight is not None
    headed = value is not None and key.size(2) == value.size(2) == query.size(2)
    learns = loss_coeff > 0 and torch.is_grad_enabled()
    if not (absorbed or headed) or (learns and not (sparse_loss and absorbed)):
        return None
    if not _fits(query, None if up_v_weight is None else up_v_weight.size(-1)):
        return None
    starts, ends = varlen_starts.int(), varlen_ends.int()
    with torch.set_grad_enabled(learns):
        found = _choose(q_indexer, k_indexer, indexer_weights, indexer_topk, starts, ends, use_relu)
    rows = zip(query.unbind(1), key.unbind(1), found, strict=True)
    if up_v_weight is not None:
        pairs = [_attend(q, k, one.indices, softmax_scale, up_v_weight.size(-1)) for q, k, one in rows]
        output = torch.einsum("sbhc,hvc->sbhv", torch.stack([out for out, _ in pairs], 1), up_v_weight)
    else:
        assert value is not None
        pairs = [
            masked_mha(q, k, v, selection_bits(one.indices, len(k)), starts, ends, softmax_scale)
            for (q, k, one), v in zip(rows, value.unbind(1), strict=True)
        ]
        output = torch.stack([out for out, _ in pairs], 1)
    if not learns:
        return output.flatten(2), output.new_zeros((), dtype=torch.float32)
    loss = _loss(
        query, key, found, [lse for _, lse in pairs], softmax_scale, loss_coeff, pg_collection, query_valid_rows,
        calculate_per_token_loss,
    )  # fmt: skip
    return output.flatten(2), loss


def _fits(query: Tensor, latent: int | None) -> bool:
    """Whether the kernels of query's device take it, `[S, B, H, D]`, with a latent so wide, or with keys of heads."""
    if query.device.type != "cuda":
        return True
    if latent is None:
        return query.dtype in (torch.bfloat16, torch.float16)
    from loongforge.kernels.sparse_mla.triton import check

    try:
        check(query[:, 0], latent)
    except ValueError:
        return False
    return True


def _choose(
    q: Tensor, k: Tensor, weights: Tensor, topk: int, starts: Tensor, ends: Tensor, relu: bool
) -> list[Selection]:
    """The selection of each sequence of the batch."""
    exact = torch.are_deterministic_algorithms_enabled()
    return [
        lightning_indexer(*row, starts, ends, min(topk, len(k)), relu=relu, deterministic=exact)
        for row in zip(q.unbind(1), k.unbind(1), weights.unbind(1), strict=True)
    ]


def _attend(query: Tensor, key: Tensor, chosen: Tensor, scale: float, d_v: int) -> tuple[Tensor, Tensor]:
    """Output `[S, H, d_v]` and log-sum-exp `[S, H]` of one sequence: query `[S, H, D]`, key `[K, 1, D]`."""
    return sparse_mla(query.contiguous(), key[:, 0].contiguous(), chosen, scale=scale, d_v=d_v)


def _loss(
    query: Tensor, key: Tensor, found: list[Selection], lse: list[Tensor], scale: float, coefficient: float,
    groups: Any, valid: Tensor | None, per_token: bool,
) -> Tensor:  # fmt: skip
    """Divergence over all sequences as megatron-core counts it: the sum for a loss per token, or the mean over rows."""
    with torch.no_grad():
        rows = zip(query.unbind(1), key.unbind(1), found, lse, strict=True)
        target = torch.stack([attention_target(q, k[:, 0], one.indices, e, scale=scale) for q, k, one, e in rows])
        if groups is not None and groups.tp.size() > 1:
            dist.all_reduce(target, group=groups.tp)  # the heads of the other ranks
    scores = torch.stack([one.scores for one in found]).flatten(0, 1)  # [B * S, topk]
    weight = None if valid is None else valid.expand(len(found), query.size(0)).flatten()
    total = indexer_kl(scores, target.flatten(0, 1), weight, reduction="sum") * coefficient
    if per_token:
        return total
    return total / (len(scores) if weight is None else weight.sum().clamp_min(1))
