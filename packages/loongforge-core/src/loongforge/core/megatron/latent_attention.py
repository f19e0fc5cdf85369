"""Multi-head latent attention over megatron-core's, without the parts of it that need TransformerEngine.

Upstream chooses the layers of `MLASelfAttention` by comparing classes: without TransformerEngine the down projections
are split over tensor parallel ranks, and the gradient of the rotated key is wrong then; without a query rank it refuses
(or adds a norm that the model does not have); and both latent norms take the model's epsilon. Here the constructor
builds the same modules under the same names, with the down projections whole on every rank.

Tensor parallel ranks must split the sequence too: the down projections then see each token on one rank, and their
gradients are summed like a norm's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.typed_torch import apply_module

from loongforge.core.megatron.layers import SDPAttention
from loongforge.core.megatron.sparse_attention import SparseAttention
from loongforge.core.megatron.whole_linear import WholeLinear
from loongforge.core.model.geometry import LatentGeometry

if TYPE_CHECKING:
    from loongforge.core.megatron.specs import Layers


class LatentAttention(MLASelfAttention):
    """Self-attention through a latent; queries too where they have a rank."""

    def __init__(
        self,
        config: Any,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
        *,
        latent: LatentGeometry,
        shared: bool = False,
    ) -> None:
        """With an indexer sparse attention; `shared`: to the keys that the layer before chose."""
        assert pg_collection is not None, "LatentAttention takes its groups explicitly"
        whole = pg_collection.tp.size() == 1 or config.sequence_parallel
        assert whole, "latent attention on several tensor parallel ranks needs sequence parallelism; the plan says so"
        super(MLASelfAttention, self).__init__(
            config=config,
            submodules=replace(submodules, core_attention=IdentityOp),  # upstream would build it twice
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
            pp_layer_offset=pp_layer_offset,
            name=name,
        )
        if latent.index is None:
            self.core_attention = submodules.core_attention(
                config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, attention_type="self",
                softmax_scale=self.softmax_scale, k_channels=self.q_head_dim, v_channels=config.v_head_dim,
                cp_comm_type=cp_comm_type, pg_collection=pg_collection,
            )  # fmt: skip
        else:
            self.core_attention = SparseAttention(
                config, latent, layer_number=layer_number, norm=submodules.kv_layernorm, rotary=self.rotary_pos_emb,
                scale=self.softmax_scale, groups=pg_collection, shared=shared,
            )  # fmt: skip
        heads, hidden = config.num_attention_heads, config.hidden_size
        column = _ColumnBuilder(submodules.linear_kv_up_proj, config, pg_collection)
        if config.q_lora_rank is None:
            self.linear_q_proj = column(hidden, heads * self.q_head_dim)
        else:
            self.linear_q_down_proj = WholeLinear(hidden, config.q_lora_rank, config)
            self.q_layernorm = submodules.q_layernorm(
                hidden_size=config.q_lora_rank, config=config, eps=latent.norm_epsilon
            )
            self.linear_q_up_proj = column(config.q_lora_rank, heads * self.q_head_dim)
        self.linear_kv_down_proj = WholeLinear(hidden, config.kv_lora_rank + config.qk_pos_emb_head_dim, config)
        self.kv_layernorm = submodules.kv_layernorm(
            hidden_size=config.kv_lora_rank, config=config, eps=latent.norm_epsilon
        )
        self.linear_kv_up_proj = column(config.kv_lora_rank, heads * (config.qk_head_dim + config.v_head_dim))

    def get_query_key_value_tensors(
        self,
        hidden_states: torch.Tensor,
        key_value_states: Any = None,
        position_ids: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        inference_context: Any = None,
        **named: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Query, key and value of each head, and both latents; or in place of key and value what `SparseAttention`
        takes to gather rows of the latent."""
        core = self.core_attention
        tokens = len(hidden_states) * self.tp_group.size()
        if isinstance(core, SparseAttention) and core.absorbs(tokens, packed_seq_params):
            return self._absorbed(hidden_states, packed_seq_params)
        made: Any = super().get_query_key_value_tensors(
            hidden_states, key_value_states, position_ids, packed_seq_params, inference_context, **named
        )
        return made

    def _absorbed(self, hidden: torch.Tensor, packed: PackedSeqParams | None) -> tuple[torch.Tensor, ...]:
        """As upstream makes them, without keys and values of every head: query `[S, B, N, D]`, the latent beside the
        rotated key `[S, B, L + P]`, the up-projection `[N, D - P + V, L]`, and both latents."""
        config, rotary = self.config, cast("Any", self.rotary_pos_emb)
        length = rotary.get_rotary_seq_len(None, None, hidden, config, packed)
        table = rotary(length, packed_seq=packed is not None)
        frequencies, amplitude = table if isinstance(table, tuple) else (table, 1.0)
        low, both = self._qkv_down_projection(hidden)
        latent, turned = both.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], -1)
        if packed is not None:
            low, latent, turned = (one.squeeze(1) for one in (low, latent, turned))
        low, latent = apply_module(self.q_layernorm)(low), apply_module(self.kv_layernorm)(latent)

        def turn(heads: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
            ends = None if packed is None else packed.cu_seqlens_q
            return apply_rotary_pos_emb(
                heads, angles, config=config, cu_seqlens=ends, mscale=amplitude, cp_group=self.pg_collection.cp,
                mla_rotary_interleaved=True,
            )  # fmt: skip

        def up(low: torch.Tensor, rows: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
            query = self.linear_q_up_proj(low)[0].unflatten(-1, (-1, self.q_head_dim))
            if self.tp_group.size() > 1:
                rows = gather_from_sequence_parallel_region(rows, group=self.tp_group)
            latent, key = rows.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], -1)
            content, ahead = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], -1)
            if packed is None:
                angles = angles[: len(query)]
            rows = torch.cat((latent, turn(key.unsqueeze(-2), angles).squeeze(-2)), -1)
            return torch.cat((content, turn(ahead, angles)), -1), rows, self._up_matrix()

        rows = torch.cat((latent, turned), -1)
        if not self.recompute_up_proj:
            return *up(low, rows, frequencies), low, latent
        self.qkv_up_checkpoint = CheckpointWithoutOutput()
        return *self.qkv_up_checkpoint.checkpoint(up, low, rows, frequencies), low, latent

    def _up_matrix(self) -> torch.Tensor:
        """The up-projection of this rank's heads, `[N, D - P + V, L]`: what the module makes of unit vectors.

        By its own call, because a gather of parameters waits in the module's hooks; each tensor parallel rank hands in
        a share of the vectors, because the module gathers what comes in.
        """
        rank, width = self.tp_group.rank(), self.config.kv_lora_rank
        share = -(-width // self.tp_group.size())
        weight = cast("torch.Tensor", self.linear_kv_up_proj.weight)
        units = torch.eye(share * self.tp_group.size(), width, dtype=weight.dtype, device=weight.device)
        made = self.linear_kv_up_proj(units[rank * share : (rank + 1) * share])[0]
        return made[:width].t().unflatten(0, (self.num_attention_heads_per_partition, -1)).contiguous()

    def _run_core_attention(self, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> torch.Tensor:
        """Upstream pads values of packed rows to the width of keys for TransformerEngine; ours takes any width."""
        if not isinstance(self.core_attention, SDPAttention | SparseAttention):
            return super()._run_core_attention(query, key, value, attention_mask, **kwargs)
        return self.core_attention(query, key, value, attention_mask, **kwargs)


class _ColumnBuilder:
    """Builds matrices whose rows tensor parallel ranks share."""

    def __init__(self, linear: Any, config: Any, groups: ProcessGroupCollection) -> None:
        self.linear, self.config, self.groups = linear, config, groups

    def __call__(self, input_size: int, output_size: int) -> torch.nn.Module:
        return self.linear(
            input_size, output_size, config=self.config, init_method=self.config.init_method, gather_output=False,
            bias=False, skip_bias_add=False, is_expert=False, tp_group=self.groups.tp,
        )  # fmt: skip


def latent_attention_spec(layers: Layers, latent: LatentGeometry, *, shared: bool = False) -> ModuleSpec:
    """Latent attention out of the platform's layers; `shared`: to the keys that the layer before chose."""
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal, "latent": latent, "shared": shared},
        submodules=MLASelfAttentionSubmodules(
            linear_kv_up_proj=layers.column_linear,
            core_attention=layers.core_attention,
            linear_proj=layers.row_linear,
            q_layernorm=layers.norm,
            kv_layernorm=layers.norm,
        ),
    )


def latent_options(latent: LatentGeometry, rotary_base: float) -> dict[str, Any]:
    """megatron-core's `MLATransformerConfig` options."""
    stretched = latent.rope_factor != 1.0
    return {
        "multi_latent_attention": True,
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_type": "yarn" if stretched else "rope",
        "rotary_base": rotary_base,
        "rotary_scaling_factor": latent.rope_factor,  # takes part in the softmax scale, whatever the type
        "original_max_position_embeddings": latent.original_max_position_embeddings,
        "beta_fast": latent.beta_fast,
        "beta_slow": latent.beta_slow,
        "mscale": latent.mscale,
        "mscale_all_dim": latent.mscale_all_dim,
        "apply_rope_fusion": False,  # upstream's fused form wants its own Triton kernels
    }
