"""Translate the geometry of an encoder or a projector for megatron-core, and choose its layers."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from loongforge.core.config.run import ComponentParallel
from loongforge.core.errors import ConfigError
from loongforge.core.megatron.transformer_config import compute_type
from loongforge.core.model.geometry import EncoderGeometry, ProjectorGeometry

if TYPE_CHECKING:
    from loongforge.core.megatron.specs import Layers
    from loongforge.core.model.contract import TowerContext


def encoder_config(geometry: EncoderGeometry, context: TowerContext) -> TransformerConfig:
    """megatron-core's configuration of an encoder on the ranks of its own grid.

    Weights stay unset: `initial_weights` fills them, the same on every layout. Raises `ConfigError` when the tensor
    parallel size does not divide the encoder, or full recompute would pass over a deepstack layer.
    """
    tp, parallel = context.groups.tp.size(), context.component.parallel
    problems = [
        f"model.image_encoder.tensor_model_parallel_size={tp}: does not divide {name}={size}."
        for name, size in (
            ("num_attention_heads", geometry.num_attention_heads),
            ("ffn_hidden_size", geometry.ffn_hidden_size),
        )
        if size % tp
    ]
    problems += _hidden_levels(geometry, parallel)
    if problems:
        raise ConfigError(*problems)
    gated = geometry.gated
    with warnings.catch_warnings():
        # Recomputing core attention is advised against for TransformerEngine's; an encoder's is ours.
        warnings.filterwarnings("ignore", "If you are using transformer_engine", UserWarning)
        return TransformerConfig(
            num_layers=geometry.num_layers,
            hidden_size=geometry.hidden_size,
            ffn_hidden_size=geometry.ffn_hidden_size,
            num_attention_heads=geometry.num_attention_heads,
            num_query_groups=geometry.num_attention_heads,
            kv_channels=geometry.hidden_size // geometry.num_attention_heads,
            normalization=geometry.normalization,
            layernorm_epsilon=geometry.norm_epsilon,
            add_bias_linear=geometry.linear_bias,
            gated_linear_unit=gated,
            activation_func=F.silu if gated else partial(F.gelu, approximate="tanh"),
            # megatron-core's hook for an activation module in the MLP; its name speaks of TransformerEngine.
            use_te_activation_func=gated and context.layers.activation is not None,
            apply_rope_fusion=True,  # TransformerEngine's, or ours through core.megatron.repairs
            **_recompute(parallel),
            **_shared(context),
        )


def projector_config(geometry: ProjectorGeometry, context: TowerContext) -> TransformerConfig:
    """megatron-core's configuration of the projector's two-layer MLPs; there is no attention in it."""
    encoder, tp = context.encoder, context.groups.tp.size()
    width = encoder.hidden_size * encoder.spatial_merge_size**2
    if width % tp:
        raise ConfigError(
            f"model.image_encoder.tensor_model_parallel_size={tp}: does not divide the projector's width {width} "
            f"({encoder.spatial_merge_size**2} patches of {encoder.hidden_size})."
        )
    return TransformerConfig(
        num_layers=1,
        hidden_size=context.output_size,
        ffn_hidden_size=width,
        num_attention_heads=tp,  # asked for, never used
        kv_channels=1,
        normalization=geometry.normalization,
        layernorm_epsilon=geometry.norm_epsilon,
        add_bias_linear=True,
        gated_linear_unit=False,
        activation_func=F.gelu,
        **_shared(context),
    )


def encoder_block(config: TransformerConfig, layers: Layers) -> TransformerBlockSubmodules:
    """Pre-norm layers with attention inside segments; no norm after the last: the projector has its own."""
    add: Any = get_bias_dropout_add  # a function, where upstream's annotation says class
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=layers.norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=layers.column_linear,
                    core_attention=layers.segment_attention,
                    linear_proj=layers.row_linear,
                ),
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=layers.norm,
            mlp=partial(
                MLP.as_mlp_submodule,
                submodules=MLPSubmodules(
                    linear_fc1=layers.column_linear,
                    linear_fc2=layers.row_linear,
                    activation_func=layers.activation if config.gated_linear_unit else None,
                ),
                ffn_hidden_size=config.ffn_hidden_size,
            ),
            mlp_bda=add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * config.num_layers, layer_norm=None)


def _shared(context: TowerContext) -> dict[str, Any]:
    dtype = compute_type(context.run.train)
    return {
        "tensor_model_parallel_size": context.groups.tp.size(),
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "perform_initialization": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "cuda_graph_modules": [],  # the default names a deprecated scope and warns
        "calculate_per_token_loss": True,  # gradients are sums, divided by the unmasked tokens of the batch
        "deterministic_mode": False,  # TransformerEngine's switch; torch's own is set by the trainer
        # Fusions that need TransformerEngine, Apex or the compiler; our layers bring their own.
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def _recompute(parallel: ComponentParallel) -> dict[str, Any]:
    if parallel.recompute_granularity is None:
        return {}
    if parallel.recompute_granularity == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(parallel.recompute_modules or ("core_attn",)),
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": parallel.recompute_method or "uniform",
        "recompute_num_layers": parallel.recompute_num_layers or 1,
    }


def _hidden_levels(geometry: EncoderGeometry, parallel: ComponentParallel) -> list[str]:
    """megatron-core answers the output of a recomputed group's last layer alone."""
    size, last = parallel.recompute_num_layers or 1, geometry.num_layers - 1
    uniform = parallel.recompute_granularity == "full" and parallel.recompute_method in (None, "uniform")
    inside = [layer for layer in geometry.deepstack_layers if (layer + 1) % size and layer != last]
    if not uniform or not inside:
        return []
    return [
        f"model.image_encoder.recompute_num_layers={size}: deepstack layers {inside} (from 0) lie inside a recomputed "
        "group, which answers its last layer alone. Set it to 1, or recompute_method to block."
    ]
