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
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from loongforge.core.megatron.layers import SDPAttention
from loongforge.core.megatron.sparse_attention import SparseAttention
from loongforge.core.megatron.whole_linear import WholeLinear
from loongforge.core.model.geometry import IndexGeometry, LatentGeometry

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
        latent_epsilon: float,
        index: IndexGeometry | None = None,
        shared: bool = False,
    ) -> None:
        """`index`: sparse attention; `shared`: to the keys that the layer before chose."""
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
        if index is None:
            self.core_attention = submodules.core_attention(
                config=config, layer_number=layer_number, attn_mask_type=attn_mask_type, attention_type="self",
                softmax_scale=self.softmax_scale, k_channels=self.q_head_dim, v_channels=config.v_head_dim,
                cp_comm_type=cp_comm_type, pg_collection=pg_collection,
            )  # fmt: skip
        else:
            self.core_attention = SparseAttention(
                config, index, norm=submodules.kv_layernorm, rotary=self.rotary_pos_emb, scale=self.softmax_scale,
                groups=pg_collection, shared=shared,
            )  # fmt: skip
        heads, hidden = config.num_attention_heads, config.hidden_size
        column = _ColumnBuilder(submodules.linear_kv_up_proj, config, pg_collection)
        if config.q_lora_rank is None:
            self.linear_q_proj = column(hidden, heads * self.q_head_dim)
        else:
            self.linear_q_down_proj = WholeLinear(hidden, config.q_lora_rank, config)
            self.q_layernorm = submodules.q_layernorm(hidden_size=config.q_lora_rank, config=config, eps=latent_epsilon)
            self.linear_q_up_proj = column(config.q_lora_rank, heads * self.q_head_dim)
        self.linear_kv_down_proj = WholeLinear(hidden, config.kv_lora_rank + config.qk_pos_emb_head_dim, config)
        self.kv_layernorm = submodules.kv_layernorm(hidden_size=config.kv_lora_rank, config=config, eps=latent_epsilon)
        self.linear_kv_up_proj = column(config.kv_lora_rank, heads * (config.qk_head_dim + config.v_head_dim))

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
        params={
            "attn_mask_type": AttnMaskType.causal,
            "latent_epsilon": latent.norm_epsilon,
            "index": latent.index,
            "shared": shared,
        },
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
