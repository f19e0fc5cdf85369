"""RMSNorm of query and key over all heads of a token, where tensor parallelism splits the heads (MiniMax-M2)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention

from loongforge.core.megatron.layers import Norm


class WholeNorm(Norm):
    """A weight for every channel of `heads` heads, whole on every rank.

    megatron-core sums the gradient of a query or key norm over tensor parallel ranks; each has that of its own heads.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, heads: int, **options: Any) -> None:
        super().__init__(config, hidden_size * heads, eps, **options)
        assert self.rms, "the mean square alone is shared among ranks"
        assert not self.zero_centered, "no model has both"
        self.heads = heads
        self.group: dist.ProcessGroup | None = None
        """Ranks that share the heads, set by the attention that it belongs to."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[S, B, heads of this rank, D]` to the same shape; collective over the group."""
        assert self.group is not None, "set by WholeNormAttention"
        flat = hidden.flatten(-2)
        ranks, width = self.group.size(), flat.size(-1)
        if ranks == 1:
            return super().forward(flat).view_as(hidden)
        # Backward too every rank needs what all ranks' outputs say of the sum. Heads that several ranks hold count for
        # each of them, above and below the line.
        wide = flat.float()
        squares = reduce_from_tensor_model_parallel_region(wide.square().sum(-1, keepdim=True), group=self.group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normed = (wide * torch.rsqrt(squares / (ranks * width) + self.eps)).to(hidden.dtype)
        first = self.group.rank() * self.heads // ranks * hidden.size(-1)
        weight = self.weight[first : first + width]
        return (normed * weight).view_as(hidden)


class WholeNormAttention(SelfAttention):
    """megatron-core's attention, which tells its norms over whom the heads are split."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for norm in (self.q_layernorm, self.k_layernorm):
            assert isinstance(norm, WholeNorm), "the layer spec's"
            norm.group = self.pg_collection.tp
