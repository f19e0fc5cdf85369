"""Sparse attention for transformers' `deepseek_v32` and `glm_moe_dsa`, by the attention of this wheel.

`register()`, then `AutoModelForCausalLM.from_pretrained(..., attn_implementation="loongforge_dsa")`. transformers
chooses the keys with its own indexer and hands over their places; attention visits those in place of a dense product
with a mask `[S, S]`. Padding, packing by position ids and caches are in the boolean mask that transformers makes.

Logits and gradients are those of `eager` at every token that sees a key. A token of padding that sees none has output
0, where `eager` takes the mean of all values. Attention weights are not returned, and attention has no dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loongforge.kernels.masked_mha import masked_mha
from loongforge.kernels.selection_bits import selection_bits

NAME = "loongforge_dsa"
"""What a user writes as `attn_implementation`."""


def register() -> None:
    """Make `attn_implementation="loongforge_dsa"` known to transformers 5.23 or later, for this process."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(*arguments: Any, **named: Any) -> Tensor:
    """transformers' mask bool `[B, 1, S, T]`, made even where it is plainly causal: the indexer needs one."""
    from transformers.masking_utils import sdpa_mask

    made = sdpa_mask(*arguments, **named | {"allow_is_causal_skip": False})
    assert made is not None
    return made


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float, indices: Tensor | None = None, dropout: float = 0.0, **named: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Output `[B, S, H, V]` from query `[B, H, S, D]`, key `[B, H, T, D]` and value `[B, H, T, V]`.

    indices int32 `[B, S, K]` are the keys that the indexer chose; those that attention_mask, bool `[B, 1, S, T]`, hides
    do not count. Raises ValueError where there are none, where the mask adds numbers, and for dropout.
    """
    if indices is None:
        raise ValueError(
            f"attn_implementation={NAME!r} attends to the keys of an indexer, and {type(module).__name__} hands over "
            f"none: deepseek_v32 and glm_moe_dsa do; take 'sdpa' for other models."
        )
    if dropout:
        raise ValueError(f"attn_implementation={NAME!r} has no dropout: set attention_dropout={dropout} to 0.")
    if attention_mask is None or attention_mask.dtype != torch.bool:
        have = "None" if attention_mask is None else attention_mask.dtype
        raise ValueError(
            f"attn_implementation={NAME!r} takes a boolean mask, True where a key is seen, not {have}: hand over a "
            f"mask of padding [B, T], or a boolean one [B, 1, S, T]."
        )
    seen = attention_mask[:, 0].gather(-1, indices.long())
    chosen = indices.int().masked_fill(~seen, -1)
    rows = [
        _attend(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), keys, scaling)
        for q, k, v, keys in zip(query, key, value, chosen, strict=True)
    ]
    return torch.stack(rows), None


def _attend(query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """One row of the batch: `[S, H, D]`, `[T, H, D]`, `[T, H, V]` and int32 `[S, K]` to `[S, H, V]`."""
    ks = chosen.where(chosen >= 0, len(key)).amin(-1)
    ke = chosen.amax(-1) + 1  # 0 where nothing is seen
    return masked_mha(query, key, value, selection_bits(chosen, len(key)), ks.minimum(ke), ke, scale)[0]
