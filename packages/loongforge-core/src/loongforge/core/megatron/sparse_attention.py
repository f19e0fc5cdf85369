"""DeepSeek Sparse Attention: a small network chooses the keys that each query attends to (DeepSeek-V3.2, 2025).

Core attention of `LatentAttention`, with an indexer of its own. The indexer sees the layer's input and the latent of
the queries without a way back for gradients, and learns from one loss alone: how far its scores are from what attention
gave the keys that it chose (equation 4), or in its warm-up, where attention goes to every key, from what it gave all of
them (equation 3).

Shapes: S tokens of a sequence on this context parallel rank, C on all of them, B batch, N heads of this tensor parallel
rank, D and V widths of a key's and a value's head, L rank of the latent of keys and values and P width of the rotated
part beside it, R rank of the query latent, H hidden, I index heads, E their width, K chosen keys. Under sequence
parallelism what the indexer reads is split over tensor parallel ranks; each chooses for its own tokens, so that all
have the same choice. Keys and values of other context parallel ranks are gathered, the indexer's keys too. Heads stay
apart over tensor parallel ranks, whatever the route.

A layer without an indexer attends to the keys that the layer before it did (GLM-5.2); `shared_selection` says how they
get there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

from loongforge.core.megatron.indexer import Indexer
from loongforge.core.megatron.indexer_loss import Scored, chosen_shares, every_key_loss, key_shares, rows_at_once
from loongforge.core.megatron.layers import PackedRow
from loongforge.core.megatron.row_parts import Sight
from loongforge.core.model.geometry import IndexGeometry, LatentGeometry
from loongforge.core.model.sparse_route import sparse_route
from loongforge.kernels.attention_target import attention_target
from loongforge.kernels.dsa import absorb
from loongforge.kernels.indexer_kl import indexer_kl
from loongforge.kernels.lightning_indexer import Selection, lightning_indexer
from loongforge.kernels.masked_mha import masked_mha
from loongforge.kernels.selection_bits import selection_bits
from loongforge.kernels.sparse_mla import sparse_mla


class SparseAttention(MegatronModule):
    """Causal attention to the chosen keys, padded or packed rows."""

    def __init__(
        self,
        config: Any,
        latent: LatentGeometry,
        *,
        layer_number: int,
        norm: Any,
        rotary: Any,
        scale: float,
        groups: ProcessGroupCollection,
        shared: bool = False,
    ) -> None:
        """`shared`: without an indexer of its own."""
        super().__init__(config=config)
        assert latent.index is not None, "built for models with an indexer"
        index: IndexGeometry = latent.index
        assert config.num_moe_experts or not index.loss_coeff, (
            "megatron-core scales such a loss for models with experts"
        )
        self.latent, self.index, self.rotary, self.scale = latent, index, rotary, scale
        self.tp, self.cp = groups.tp, groups.cp
        self.indexer = None if shared else Indexer(config, index, norm, layer_number)
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

    def boundaries(self, tokens: int, packed: PackedSeqParams | None) -> tuple[int, ...]:
        """Of the documents of a row, of which this context parallel rank has `tokens`."""
        if packed is None:
            return (0, tokens * self.cp.size())
        assert isinstance(packed, PackedRow), "packed rows come as PackedRow"
        return packed.boundaries

    def absorbs(self, tokens: int, packed: PackedSeqParams | None) -> bool:
        """Whether queries meet the latent itself in such a row: `forward` takes it, and the up-projection, then."""
        boundaries = self.boundaries(tokens, packed)
        heads, longest = self.config.num_attention_heads // self.tp.size(), _longest(boundaries)
        found = sparse_route(self.latent, heads=heads, queries=tokens, keys=boundaries[-1], longest=longest)
        return found.route == "gather"

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None, packed_seq_params: PackedSeqParams | None = None, *,
        x: torch.Tensor | None = None, qr: torch.Tensor | None = None, **_: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Query and key `[S, B, N, D]`, value `[S, B, N, V]`, x `[S, B, H]` and qr `[S, B, R]` of this rank's tokens to
        `[S, B, N * V]`.

        Or `absorbs`: the latent with the rotated key `[S, B, L + P]` in place of key, the up-projection
        `[N, D - P + V, L]` in place of value. Packed rows have no B, but for x. Without an indexer x and
        qr are None, and `attention_mask` is what `telling` told of the layer before.
        """
        boundaries, absorbed = self.boundaries(len(query), packed_seq_params), key.dim() < query.dim()
        if packed_seq_params is not None:
            query, key = query.unsqueeze(1), key.unsqueeze(1)
            value = value if absorbed else value.unsqueeze(1)
        sight = self._sight(boundaries, packed_seq_params, query.device)
        key = self._of_all_contexts(key, sight)
        value = value if absorbed else self._of_all_contexts(value, sight)
        operands = [
            (query[:, row].contiguous(), key[:, row].contiguous(), value if absorbed else value[:, row].contiguous())
            for row in range(query.size(1))
        ]
        nothing, learns = [None] * len(operands), self._learns()
        if self.index.warmup:
            scored = self._score(x, qr, sight) if learns else nothing
            outputs = [self._attend_to_all(*one, made, sight) for one, made in zip(operands, scored, strict=True)]
            chosen: Sequence[Selection | None] = nothing
        else:
            if _longest(boundaries) <= self.index.topk and not absorbed and not learns and attention_mask is None:
                chosen = nothing
            elif self.indexer is None:
                chosen = self._given(attention_mask)
            else:
                chosen = self._choose(x, qr, sight)
            outputs = [self._attend(*one, made, sight) for one, made in zip(operands, chosen, strict=True)]
        if self._asked is not None:
            indices = [one.indices for one in chosen if one is not None]
            # What was given goes on as it is: recomputation saves one tensor however many layers share it.
            self._asked.append(attention_mask if self.indexer is None or not indices else torch.stack(indices))
        return torch.stack(outputs, dim=1).flatten(2)

    def _sight(self, boundaries: tuple[int, ...], packed: PackedSeqParams | None, device: torch.device) -> Sight:
        """Of a packed row once for all layers, a row of one document for each: that is less than to keep it."""
        if isinstance(packed, PackedRow):
            return packed.sight(self.cp.rank(), self.cp.size(), device)
        return Sight.of(boundaries, self.cp.rank(), self.cp.size(), device)

    def _of_all_contexts(self, tensor: torch.Tensor, sight: Sight) -> torch.Tensor:
        """`[S, B, ...]` to `[C, B, ...]` in the order of the sequence."""
        if sight.natural is None:
            return tensor
        return gather_from_sequence_parallel_region(tensor, group=self.cp)[sight.natural]

    def _given(self, indices: torch.Tensor | None) -> list[Selection]:
        """As `_choose`, what the layer before chose; it has no scores, because nothing learns from them here."""
        assert indices is not None, "the layer before hands on what it chose"
        return [Selection(one, torch.empty(0), (one >= 0).sum(1, dtype=torch.int32)) for one in indices]

    def _score(self, x: torch.Tensor | None, qr: torch.Tensor | None, sight: Sight) -> list[Scored]:
        """What the indexer makes of every row of the batch."""
        assert self.indexer is not None, "asked of layers with an indexer only"
        assert x is not None, "an indexer reads the layer's input"
        assert qr is not None, "an indexer reads the latent of the queries"
        x, qr = x.detach(), qr.detach().view(*x.shape[:2], -1)
        rows, ks = (one[self._mine(len(x))] for one in (sight.rows, sight.ks))
        table: Any = self.rotary(_longest(sight.boundaries), packed_seq=True)  # a packed row's table is whole
        frequencies, amplitude = table if isinstance(table, tuple) else (table, 1.0)
        query, key, weights = self.indexer(x, qr, frequencies[rows - ks], amplitude)
        if self.tp.size() > 1:
            key = gather_from_sequence_parallel_region(key, group=self.tp)
        key = self._of_all_contexts(key, sight)
        return [Scored(*(tensor[:, row].contiguous() for tensor in (query, key, weights))) for row in range(x.size(1))]

    def _choose(self, x: torch.Tensor | None, qr: torch.Tensor | None, sight: Sight) -> list[Selection]:
        """For every row of the batch the keys of this tensor parallel rank's tokens."""
        mine = self._mine(len(sight.rows) // self.tp.size())
        ks, ke = sight.ks[mine], sight.ke[mine]
        exact = torch.are_deterministic_algorithms_enabled()
        return [
            lightning_indexer(*scored, ks, ke, self.index.topk, fp8=self.index.fp8, deterministic=exact)
            for scored in self._score(x, qr, sight)
        ]

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chosen: Selection | None, sight: Sight
    ) -> torch.Tensor:
        """One row of the batch: `[S, N, D]`, `[C, N, D]`, `[C, N, V]`, or as `forward` takes them absorbed, to
        `[S, N, V]`; `chosen` is None where all that a token sees is."""
        if chosen is None:
            return masked_mha(query, key, value, None, sight.ks, sight.ke, self.scale)[0]
        indices, absorbed = chosen.indices, key.dim() == 2
        if self.tp.size() > 1:
            indices = gather_from_sequence_parallel_region(indices, group=self.tp)
        if absorbed:
            content = query.size(2) - key.size(1) + value.size(2)
            query = absorb(query, value[:, :content])
            compressed, lse = sparse_mla(query, key, indices, scale=self.scale, d_v=value.size(2))
            output = torch.einsum("snl,nvl->snv", compressed, value[:, content:])
        else:
            bits = selection_bits(indices, len(key))
            output, lse = masked_mha(query, key, value, bits, sight.ks, sight.ke, self.scale)
        if not self._learns():
            return output
        with torch.no_grad():
            shares = attention_target if absorbed else chosen_shares
            target = self._of_all_heads(shares(query, key, indices, lse, scale=self.scale))
        return self._taught(output, indexer_kl(chosen.scores, target, reduction="sum"), len(target))

    def _attend_to_all(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scored: Scored | None, sight: Sight
    ) -> torch.Tensor:
        """One row of the batch as `_attend` takes it; every key is seen, and the indexer learns where it has scored."""
        output, lse = masked_mha(query, key, value, None, sight.ks, sight.ke, self.scale)
        if scored is None:
            return output
        tokens, size = len(scored.query), self.tp.size()

        def shares(part: slice) -> torch.Tensor:
            rows = torch.arange(len(query), device=query.device).view(size, tokens)[:, part].flatten()
            bounds = sight.ks[rows], sight.ke[rows]
            return self._of_all_heads(key_shares(query[rows], key, lse[rows], *bounds, scale=self.scale))

        ks, ke = (one[self._mine(tokens)] for one in (sight.ks, sight.ke))
        loss = every_key_loss(scored, ks, ke, shares, rows_at_once(len(key) * size))
        # Of what is below, indexers alone train, and the residual stream leads to their losses.
        return self._taught(output.detach(), loss, tokens)

    def _taught(self, output: torch.Tensor, loss: torch.Tensor, tokens: int) -> torch.Tensor:
        """`output`, whose backward pass begins that of the loss: a sum over tokens, because the trainer divides every
        gradient by the tokens of the global batch."""
        assert self.indexer is not None, "asked of layers with an indexer only"
        self.indexer.note(loss, tokens)
        return MoEAuxLossAutoScaler.apply(output, self.index.loss_coeff * loss)

    def _of_all_heads(self, shares: torch.Tensor) -> torch.Tensor:
        """From shares of this rank's heads for the tokens of all tensor parallel ranks `[S, ...]`, one rank after the
        other, those of all heads for this rank's tokens."""
        return reduce_scatter_to_sequence_parallel_region(shares, group=self.tp) if self.tp.size() > 1 else shares

    def _mine(self, tokens: int) -> slice:
        """This tensor parallel rank's tokens among the context parallel rank's."""
        return slice(self.tp.rank() * tokens, (self.tp.rank() + 1) * tokens)

    def _learns(self) -> bool:
        """Whether this pass teaches the indexer."""
        if self.indexer is None:
            return False
        return self.training and torch.is_grad_enabled() and self.indexer.linear_wk.weight.requires_grad


def _longest(boundaries: tuple[int, ...]) -> int:
    return max(end - start for start, end in pairwise(boundaries))
