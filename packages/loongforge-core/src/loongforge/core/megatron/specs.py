"""Which class stands for each part of a transformer layer, and why; said once per run.

TransformerEngine's layers where the platform can run them, otherwise megatron-core's linear layers with our norm and
core attention. Parameter names are the same either way, so checkpoints move between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from loongforge.core.config.experts import ExpertConfig
from loongforge.core.megatron.delta import DeltaOps, delta_ops, delta_spec
from loongforge.core.megatron.experts import experts_builder, mlp_submodules
from loongforge.core.megatron.grouped_experts import GroupedOps, grouped_ops
from loongforge.core.megatron.latent_attention import latent_attention_spec
from loongforge.core.megatron.layers import GatedActivation, Norm, RowLinear, SDPAttention
from loongforge.core.megatron.ops import ops_for
from loongforge.core.megatron.segment_attention import SegmentAttention
from loongforge.core.megatron.whole_norm import WholeNorm, WholeNormAttention
from loongforge.core.model.geometry import TransformerGeometry
from loongforge.core.platform import Platform


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The classes of one backend."""

    name: str
    reason: str
    column_linear: Any
    row_linear: Any
    norm: Any
    core_attention: Any
    segment_attention: Any
    """Core attention of encoders."""
    activation: Any
    """Builds the gated activation of the MLP; None leaves it to megatron-core."""
    linear_cross_entropy: Any
    """Logits and loss in one op."""
    uneven_gather: bool
    """Whether the platform's collectives gather tensors of unequal sizes."""
    ops: tuple[str, ...]
    """What the kernel registry chose and why."""
    grouped_experts: bool
    """Whether one matrix product for all experts is faster than one for each."""
    grouped: Callable[[], GroupedOps]
    """What such experts call, chosen when the first of them is built: the choice imports kernels."""
    delta: Callable[[], DeltaOps]
    """The parts of a gated delta rule, chosen when the first such layer is built: the choice imports kernels."""

    def groups_experts(self, training: ExpertConfig) -> bool:
        """Whether one matrix product serves all experts of a layer in this run."""
        return self.grouped_experts if training.moe_grouped_gemm is None else training.moe_grouped_gemm


def layers_for(platform: Platform, dtype: torch.dtype) -> Layers:
    """TransformerEngine where the platform says it runs, ours elsewhere."""
    ops = ops_for(platform, dtype)
    uneven_gather, activation = platform.backend != "gloo", partial(GatedActivation, swiglu=ops.swiglu)
    together: dict[str, Any] = {
        "grouped_experts": platform.device_type == "cuda" and dtype == torch.bfloat16,
        "grouped": cache(partial(grouped_ops, platform.device_type, dtype)),
        "segment_attention": partial(SegmentAttention, packed_attention=ops.segment_attention),
        "delta": cache(partial(delta_ops, platform.device_type, dtype)),
    }
    if "te" in platform.capabilities():
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TEDotProductAttention,
            TENorm,
            TERowParallelLinear,
        )

        # Norm and linear stay separate modules, so that names and checkpoints equal the torch backend's.
        return Layers(
            name="transformer_engine", reason="transformer-engine is installed", column_linear=TEColumnParallelLinear,
            row_linear=TERowParallelLinear, norm=TENorm, core_attention=TEDotProductAttention, activation=activation,
            linear_cross_entropy=ops.linear_cross_entropy, uneven_gather=uneven_gather,
            ops=(ops.lines["swiglu"], ops.lines["linear_cross_entropy"]), **together,
        )  # fmt: skip
    reason = f"platform {platform.name}" if platform.device_type == "cpu" else "transformer-engine is not installed"
    return Layers(
        name="torch", reason=reason, column_linear=ColumnParallelLinear, row_linear=RowLinear,
        norm=partial(Norm, rms_norm=ops.rms_norm), 
        core_attention=partial(
            SDPAttention, causal_attention=ops.causal_attention, packed_attention=ops.packed_attention
        ),
        activation=activation, linear_cross_entropy=ops.linear_cross_entropy,
        uneven_gather=uneven_gather, ops=tuple(ops.lines.values()), **together,
    )  # fmt: skip


def block_spec(
    config: Any,
    layers: Layers,
    vp_stage: int | None,
    geometry: TransformerGeometry,
    deepstack: int = 0,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of one pipeline chunk and the last norm.

    The first `deepstack` layers of the whole model add an encoder's features. `pp_rank` is this rank's stage,
    megatron-core's global one when None.
    """
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    dense = geometry.num_layers if geometry.experts is None else geometry.experts.first_dense_layers
    with_delta, shared = () if geometry.delta is None else geometry.delta.layers, geometry.shared_index_layers
    specs = [
        layer_spec(
            config, layers, geometry, experts=number >= dense, deepstack=number < deepstack, delta=number in with_delta,
            shared=number in shared, hands_on=number + 1 in shared and number + 1 < first + count,
        )
        for number in range(first, first + count)
    ]  # fmt: skip
    assert first not in shared, "the plan lets no chunk begin with a layer that takes the selection of another"
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=layers.norm)


def layer_spec(
    config: Any,
    layers: Layers,
    geometry: TransformerGeometry,
    *,
    experts: bool = False,
    deepstack: bool = False,
    delta: bool = False,
    shared: bool = False,
    hands_on: bool = False,
) -> ModuleSpec:
    """One decoder layer: pre-norm self-attention (`delta`: a gated delta rule), then a gated MLP (or `experts`).

    `shared` attends to the keys that the layer before chose, `hands_on` tells the next layer its own.
    """
    add: Any = get_bias_dropout_add  # a function, where upstream's annotation says class
    module, params = _layer_kind(deepstack=deepstack, shares=shared or hands_on, hands_on=hands_on)
    return ModuleSpec(
        module=module,
        params=params,
        submodules=TransformerLayerSubmodules(
            input_layernorm=layers.norm,
            self_attention=_mixer_spec(config, layers, geometry, delta=delta, shared=shared),
            self_attn_bda=add,
            pre_mlp_layernorm=layers.norm,
            mlp=experts_builder(layers, geometry.experts)
            if experts and geometry.experts
            else _mlp_builder(config, layers),
            mlp_bda=add,
        ),
    )


def _layer_kind(*, deepstack: bool, shares: bool, hands_on: bool) -> tuple[type[TransformerLayer], dict[str, Any]]:
    """The class of a layer and its own arguments; the plan refuses layers that would be both."""
    assert not (deepstack and shares), "both need the context that layers pass on"
    if deepstack:
        from loongforge.core.megatron.deepstack import DeepstackLayer

        return DeepstackLayer, {}
    if shares:
        from loongforge.core.megatron.shared_selection import SharingLayer

        return SharingLayer, {"hands_on": hands_on}
    return TransformerLayer, {}


def _mixer_spec(config: Any, layers: Layers, geometry: TransformerGeometry, *, delta: bool, shared: bool) -> ModuleSpec:
    if delta:
        assert geometry.delta is not None, "asked of models with such layers only"
        return delta_spec(layers, geometry.delta)
    if geometry.latent is not None:
        return latent_attention_spec(layers, geometry.latent, shared=shared)
    return _attention_spec(config, layers, geometry)


def _attention_spec(config: Any, layers: Layers, geometry: TransformerGeometry) -> ModuleSpec:
    head_norm = layers.norm if config.qk_layernorm else IdentityOp
    query_norm, key_norm = head_norm, head_norm
    if whole := geometry.qk_layernorm and geometry.qk_norm_whole:
        query_norm = partial(WholeNorm, heads=geometry.num_attention_heads)
        key_norm = partial(WholeNorm, heads=geometry.num_query_groups)
    return ModuleSpec(
        module=WholeNormAttention if whole else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=layers.column_linear,
            core_attention=layers.core_attention,
            linear_proj=layers.row_linear,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )


def _mlp_builder(config: Any, layers: Layers) -> Any:
    return partial(MLP.as_mlp_submodule, submodules=mlp_submodules(layers), ffn_hidden_size=config.ffn_hidden_size)
