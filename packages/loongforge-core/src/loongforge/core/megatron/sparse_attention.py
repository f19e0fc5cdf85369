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
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from loongforge.core.megatron.context_parallel import local_indices, natural_order
from loongforge.core.megatron.indexer import Indexer
from loongforge.core.megatron.layers import PackedRow
from loongforge.core.model.geometry import IndexGeometry
from loongforge.kernels.indexer_kl import indexer_kl
from loongforge.kernels.lightning_indexer import Selection, lightning_indexer
from loongforge.kernels.masked_mha import masked_mha
from loongforge.kernels.row_bounds import row_bounds
from loongforge.kernels.selection_bits import selection_bits

SCORE_BYTES = 1 << 28
"""Of attention scores that exist at a time while the indexer's target is computed."""


class SparseAttention(MegatronModule):
    """Causal attention to the chosen keys, padded or packed rows."""

    requires_dsa_inputs = True
    """Tells megatron-core's latent attention to hand over its input and the latent of the queries."""

    def __init__(
        self,
        config: Any,
        index: IndexGeometry,
        *,
        layer_number: int,
        norm: Any,
        rotary: Any,
        scale: float,
        groups: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        assert config.num_moe_experts or not index.loss_coeff, (
            "megatron-core scales such a loss for models with experts"
        )
        self.index, self.rotary, self.scale = index, rotary, scale
        self.tp, self.cp = groups.tp, groups.cp
        self.indexer = Indexer(config, index, norm, layer_number)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None, packed_seq_params: PackedSeqParams | None = None, *,
        x: torch.Tensor, qr: torch.Tensor, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Query and key `[S, B, N, D]`, value `[S, B, N, V]`, x `[S, B, H]` and qr `[S, B, R]` of this rank's tokens to
        `[S, B, N * V]`.

        Packed rows have no B, but for x.
        """
        boundaries = (0, query.size(0) * self.cp.size())
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, PackedRow), "packed rows come as PackedRow"
            query, key, value = (t.unsqueeze(1) if t.dim() == 3 else t for t in (query, key, value))
            qr, boundaries = qr.view(*x.shape[:2], -1), packed_seq_params.boundaries
        rows = local_indices(boundaries, self.cp.rank(), self.cp.size()).to(query.device)
        key, value = self._of_all_contexts(key, boundaries), self._of_all_contexts(value, boundaries)
        ks, ke = row_bounds(torch.tensor(boundaries, device=query.device), rows)
        chosen = self._choose(x.detach(), qr.detach(), boundaries, rows, ks, ke)
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
        loss = indexer_kl(chosen.scores, target, reduction="sum")
        self.indexer.note(loss, len(target))
        return MoEAuxLossAutoScaler.apply(output, self.index.loss_coeff * loss)

    def _learns(self) -> bool:
        """Whether this pass teaches the indexer."""
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
