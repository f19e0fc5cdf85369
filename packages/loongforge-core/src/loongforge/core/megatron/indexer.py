"""The indexer of sparse attention (DeepSeek-V3.2, 2025), which scores keys, and what a step measured of its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import (
    _apply_rotary_pos_emb_bshd,  # pyright: ignore[reportPrivateUsage] - turns the first channels of a head as they are
)
from megatron.core.transformer.module import MegatronModule

from loongforge.core.megatron.groups import World
from loongforge.core.megatron.whole_linear import WholeLinear
from loongforge.core.model.geometry import IndexGeometry, TransformerGeometry

KEY_NORM_EPSILON = 1e-6


class Indexer(MegatronModule):
    """Queries from the latent, one key for all heads, and the weights of the heads; whole on every rank."""

    def __init__(self, config: Any, index: IndexGeometry, norm: Any, layer_number: int) -> None:
        super().__init__(config=config)
        self.index, self.layer_number = index, layer_number
        self.loss: torch.Tensor | None = None
        """Since `take_loss`, before its factor: the sum over this rank's tokens, and their number; fp64 `[2]`."""
        self.linear_wq_b = WholeLinear(config.q_lora_rank, index.heads * index.head_dim, config)
        self.linear_wk = WholeLinear(config.hidden_size, index.head_dim, config)
        self.linear_weights_proj = WholeLinear(config.hidden_size, index.heads, config)
        centred = copy(config)
        centred.normalization, centred.layernorm_zero_centered_gamma = "LayerNorm", False
        self.k_norm = norm(config=centred, hidden_size=index.head_dim, eps=KEY_NORM_EPSILON)
        if index.loss_coeff == 0:
            self.requires_grad_(False)  # no loss reaches it, and weight decay must not either

    def forward(
        self, x: torch.Tensor, qr: torch.Tensor, frequencies: torch.Tensor, amplitude: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x `[S, B, H]`, qr `[S, B, R]` and the angles of every token `[S, 1, 1, rope]` to queries `[S, B, I, E]`, keys
        `[S, B, E]` and fp32 weights `[S, B, I]`, which carry the scores' scale."""
        index = self.index

        def turn(heads: torch.Tensor) -> torch.Tensor:
            return _apply_rotary_pos_emb_bshd(
                heads, frequencies, mla_rotary_interleaved=index.interleaved, mscale=amplitude
            )

        query = turn(self.linear_wq_b(qr)[0].unflatten(-1, (index.heads, index.head_dim)))
        key = turn(self.k_norm(self.linear_wk(x)[0]).unsqueeze(-2)).squeeze(-2)
        # A product in fp32 of stored bf16, as the release has it: near scores are told apart by it. The parameter stays
        # of the model's type: megatron-core casts every one of a bf16 model.
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = F.linear(x.to(wide), self.linear_weights_proj.weight.to(wide))
        return query, key, weights * (index.heads * index.head_dim) ** -0.5

    def note(self, loss: torch.Tensor, tokens: int) -> None:
        """Remember a sum of losses over `tokens` for the step's metrics."""
        both = torch.stack([loss.detach().double(), torch.full_like(loss, tokens, dtype=torch.float64)])
        self.loss = both if self.loss is None else self.loss + both

    def take_loss(self) -> torch.Tensor | None:
        """What `loss` holds; counting starts again."""
        loss, self.loss = self.loss, None
        return loss


def take_index_losses(chunks: Sequence[Any], geometry: TransformerGeometry, world: World) -> Mapping[int, float]:
    """Each layer's loss since the last call, before its factor: the mean over the tokens of the global batch, by layer
    from 0; layers of multi-token prediction come after the model's, and layers without a loss are left out.

    `chunks` is empty on a rank without a part of the foundation, whose `geometry` this is. Collective: ranks that share
    a layer counted different tokens of it, so that one sum over all of them has each once.
    """
    sums = torch.zeros(geometry.num_layers + geometry.prediction_layers, 2, dtype=torch.float64, device=world.device)
    for name, module in (named for chunk in chunks for named in chunk.named_modules()):
        if isinstance(module, Indexer) and (loss := module.take_loss()) is not None:
            sums[module.layer_number - 1 + (geometry.num_layers if "mtp" in name.split(".") else 0)] += loss
    if world.size > 1:
        dist.all_reduce(sums)
    return {layer: total / tokens for layer, (total, tokens) in enumerate(sums.tolist()) if tokens}
