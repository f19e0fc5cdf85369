"""DeepSeek Sparse Attention: a small network chooses the keys that each query attends to (DeepSeek-V3.2, 2025).

Core attention of `LatentAttention`, with an indexer of its own. The indexer sees the layer's input and the latent of
the queries without a way back for gradients, and learns from one loss alone: how far its scores are from what attention
gave the keys that it chose (equation 4). Queries, keys and values come with all their heads' widths, so that heads stay
apart over tensor parallel ranks; scores outside the choice are masked.

Shapes: S tokens of a sequence on this context parallel rank, C on all of them, B batch, N heads of this tensor parallel
rank, D and V widths of a key's and a value's head, R rank of the query latent, H hidden, I index heads, E their width,
K chosen keys. Under sequence parallelism what the indexer reads is split over tensor parallel ranks; each chooses for
its own tokens, so that all have the same choice. Keys and values of other context parallel ranks are gathered, the
indexer's keys too.

A layer without an indexer attends to the keys that the layer before it did (GLM-5.2); `shared_selection` says how they
get there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import (
    _apply_rotary_pos_emb_bshd,  # pyright: ignore[reportPrivateUsage] - turns the first channels of a head as they are
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from loongforge.core.megatron.context_parallel import local_indices, natural_order
from loongforge.core.megatron.layers import PackedRow
from loongforge.core.megatron.whole_linear import WholeLinear
from loongforge.core.model.geometry import IndexGeometry
from loongforge.kernels.indexer_kl import indexer_kl
from loongforge.kernels.lightning_indexer import Selection, lightning_indexer
from loongforge.kernels.masked_mha import masked_mha
from loongforge.kernels.row_bounds import row_bounds
from loongforge.kernels.selection_bits import selection_bits

KEY_NORM_EPSILON = 1e-6
SCORE_BYTES = 1 << 28
"""Of attention scores that exist at a time while the indexer's target is computed."""


class Indexer(MegatronModule):
    """Queries from the latent, one key for all heads, and the weights of the heads; whole on every rank."""

    def __init__(self, config: Any, index: IndexGeometry, norm: Any) -> None:
        super().__init__(config=config)
        self.index = index
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
        # fp32, as the release has it: near scores are told apart by it.
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = F.linear(x.to(wide), self.linear_weights_proj.weight.to(wide))
        return query, key, weights * (index.heads * index.head_dim) ** -0.5


class SparseAttention(MegatronModule):
    """Causal attention to the chosen keys, padded or packed rows."""

    def __init__(
        self,
        config: Any,
        index: IndexGeometry,
        *,
        norm: Any,
        rotary: Any,
        scale: float,
        groups: ProcessGroupCollection,
        shared: bool = False,
    ) -> None:
        """`shared`: without an indexer of its own."""
        super().__init__(config=config)
        assert config.num_moe_experts or not index.loss_coeff, (
            "megatron-core scales such a loss for models with experts"
        )
        self.index, self.rotary, self.scale = index, rotary, scale
        self.tp, self.cp = groups.tp, groups.cp
        self.indexer = None if shared else Indexer(config, index, norm)
        # megatron-core's latent attention asks whether to hand over its input and the latent of the queries.
        self.requires_dsa_inputs = not shared
        self._asked: list[torch.Tensor | None] | None = None

    @contextmanager
    def telling(self) -> Iterator[list[torch.Tensor | None]]:
        """The keys chosen inside the block: int32 `[B, S, K]` of this rank's tokens, or None for all before them."""
        self._asked = []
        try:
            yield self._asked
        finally:
            self._asked = None  # what recomputes core attention alone asks nothing, and keeps nothing

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None, packed_seq_params: PackedSeqParams | None = None, *,
        x: torch.Tensor | None = None, qr: torch.Tensor | None = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Query and key `[S, B, N, D]`, value `[S, B, N, V]`, x `[S, B, H]` and qr `[S, B, R]` of this rank's tokens to
        `[S, B, N * V]`.

        Packed rows have no B, but for x. Without an indexer x and qr are None, and `attention_mask` is what `telling`
        told of the layer before.
        """
        boundaries = (0, query.size(0) * self.cp.size())
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, PackedRow), "packed rows come as PackedRow"
            query, key, value = (t.unsqueeze(1) if t.dim() == 3 else t for t in (query, key, value))
            boundaries = packed_seq_params.boundaries
        rows = local_indices(boundaries, self.cp.rank(), self.cp.size()).to(query.device)
        key, value = self._of_all_contexts(key, boundaries), self._of_all_contexts(value, boundaries)
        ks, ke = row_bounds(torch.tensor(boundaries, device=query.device), rows)
        if self.indexer is None:
            chosen = self._given(attention_mask, boundaries, query.size(1))
        else:
            assert x is not None, "an indexer reads the layer's input"
            assert qr is not None, "an indexer reads the latent of the queries"
            chosen = self._choose(x.detach(), qr.detach().view(*x.shape[:2], -1), boundaries, rows, ks, ke)
        if self._asked is not None:
            indices = [one.indices for one in chosen if one is not None]
            # What was given goes on as it is: recomputation saves one tensor however many layers share it.
            self._asked.append(attention_mask if self.indexer is None or not indices else torch.stack(indices))
        outputs = [
            self._attend(query[:, row], key[:, row], value[:, row], chosen[row], ks, ke) for row in range(query.size(1))
        ]
        return torch.stack(outputs, dim=1).flatten(2)

    def _of_all_contexts(self, tensor: torch.Tensor, boundaries: tuple[int, ...]) -> torch.Tensor:
        """`[S, B, ...]` to `[C, B, ...]` in the order of the sequence."""
        size = self.cp.size()
        if size == 1:
            return tensor
        gathered = gather_from_sequence_parallel_region(tensor, group=self.cp)
        return gathered[natural_order(boundaries, size).to(tensor.device)]

    def _given(
        self, indices: torch.Tensor | None, boundaries: tuple[int, ...], batch: int
    ) -> Sequence[Selection | None]:
        """As `_choose`, what the layer before chose; it has no scores, because nothing learns from them here."""
        if indices is None:
            longest = max(end - start for start, end in pairwise(boundaries))
            assert longest <= self.index.topk, "the layer before hands on what it chose"
            return [None] * batch
        return [Selection(one, torch.empty(0), (one >= 0).sum(1, dtype=torch.int32)) for one in indices]

    def _choose(
        self, x: torch.Tensor, qr: torch.Tensor, boundaries: tuple[int, ...], rows: torch.Tensor, ks: torch.Tensor,
        ke: torch.Tensor,
    ) -> Sequence[Selection | None]:  # fmt: skip
        """For each row of the batch the keys of this rank's tokens; None where all that a token sees is chosen."""
        longest = max(end - start for start, end in pairwise(boundaries))
        if longest <= self.index.topk and not self._learns():
            return [None] * x.size(1)
        mine = slice(self.tp.rank() * len(x), (self.tp.rank() + 1) * len(x))
        rows, ks, ke = rows[mine], ks[mine], ke[mine]
        table: Any = self.rotary(longest, packed_seq=True)  # a packed row's table is whole
        frequencies, amplitude = table if isinstance(table, tuple) else (table, 1.0)
        assert self.indexer is not None, "asked of layers with an indexer only"
        query, key, weights = self.indexer(x, qr, frequencies[rows - ks], amplitude)
        if self.tp.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.tp)
        key = self._of_all_contexts(key, boundaries)
        exact = torch.are_deterministic_algorithms_enabled()
        return [
            lightning_indexer(
                query[:, row].contiguous(), key[:, row].contiguous(), weights[:, row].contiguous(), ks, ke,
                self.index.topk, deterministic=exact,
            )
            for row in range(x.size(1))
        ]  # fmt: skip

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chosen: Selection | None,
        ks: torch.Tensor, ke: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """One row of the batch: `[S, N, D]`, `[C, N, D]`, `[C, N, V]` to `[S, N, V]`."""
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        if chosen is None:
            return masked_mha(query, key, value, None, ks, ke, self.scale)[0]
        indices = chosen.indices
        if self.tp.size() > 1:
            indices = gather_from_sequence_parallel_region(indices, group=self.tp)
        bits = selection_bits(indices, len(key))
        output, lse = masked_mha(query, key, value, bits, ks, ke, self.scale)
        if not self._learns():
            return output
        with torch.no_grad():
            target = chosen_shares(query, key, indices, lse, self.scale)
            if self.tp.size() > 1:
                target = reduce_scatter_to_sequence_parallel_region(target, group=self.tp)
        # A sum over tokens: the trainer divides every gradient by the tokens of the global batch.
        loss = self.index.loss_coeff * indexer_kl(chosen.scores, target, reduction="sum")
        return MoEAuxLossAutoScaler.apply(output, loss)

    def _learns(self) -> bool:
        """Whether this pass teaches the indexer."""
        if self.indexer is None:
            return False
        return self.training and torch.is_grad_enabled() and self.indexer.linear_wk.weight.requires_grad


def chosen_shares(
    query: torch.Tensor, key: torch.Tensor, indices: torch.Tensor, lse: torch.Tensor, scale: float
) -> torch.Tensor:
    """What attention gave each chosen key, summed over heads (equation 3): `[S, K]`, 0 where the index is no key.

    query `[S, N, D]`, key `[C, N, D]`, indices int32 `[S, K]`, lse `[S, N]`. What
    `loongforge.kernels.attention_target` computes from absorbed queries, here from the keys of every head.
    """
    wide, rows = lse.dtype, max(1, SCORE_BYTES // (4 * len(key)))
    parts: list[torch.Tensor] = []
    for start in range(0, len(query), rows):
        part = slice(start, start + rows)
        place = indices[part].clamp_min(0).long()
        total = torch.zeros(place.shape, dtype=wide, device=query.device)
        for head in range(query.size(1)):
            scores = query[part, head].to(wide) @ key[:, head].to(wide).t() * scale
            total += torch.exp(scores.gather(1, place) - lse[part, head, None])
        parts.append(total.masked_fill(indices[part] < 0, 0.0))
    return torch.cat(parts)
