"""Translate a geometry and a plan into megatron-core's `TransformerConfig`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from loongforge.core.config.experts import ExpertConfig
from loongforge.core.config.run import ParallelConfig, RunConfig, TrainConfig
from loongforge.core.model.geometry import TransformerGeometry
from loongforge.core.plan.layout import Layout

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from loongforge.core.megatron.specs import Layers


def transformer_config(
    geometry: TransformerGeometry, run: RunConfig, layout: Layout, layers: Layers, *, initialise: bool
) -> TransformerConfig:
    """megatron-core's configuration of one component.

    `initialise=False` leaves parameters unset, for weights that are about to be loaded.
    """
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    dtype = compute_type(run.train)
    kind = TransformerConfig if geometry.latent is None else MLATransformerConfig
    with warnings.catch_warnings():
        # Recomputing core attention is advised against for TransformerEngine's, whichever attention is built.
        warnings.filterwarnings("ignore", "If you are using transformer_engine", UserWarning)
        return kind(
            **_block_options(geometry),
            **_expert_and_latent_options(geometry, run.moe, layout, layers),
            **_layout_options(layout, dtype),
            **_recompute_options(run.parallel),
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            perform_initialization=initialise,
            # megatron-core's hook for an activation module in the MLP; its name speaks of TransformerEngine.
            use_te_activation_func=layers.activation is not None,
            cuda_graph_modules=[],  # the default names a deprecated scope and warns
            calculate_per_token_loss=True,  # gradients are sums, divided by the unmasked tokens of the batch
            deterministic_mode=False,  # TransformerEngine's switch; torch's own is set by the trainer
            # Fusions that need TransformerEngine, Apex or the compiler; our layers bring their own.
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
        )


def compute_type(train: TrainConfig) -> torch.dtype:
    """Type of parameters and activations."""
    return torch.bfloat16 if train.precision == "bf16" else torch.float32


def _block_options(geometry: TransformerGeometry) -> dict[str, Any]:
    assert geometry.swiglu, "only gated MLPs are translated"
    return {
        "num_layers": geometry.num_layers,
        "hidden_size": geometry.hidden_size,
        "ffn_hidden_size": geometry.ffn_hidden_size,
        "num_attention_heads": geometry.num_attention_heads,
        "num_query_groups": geometry.num_query_groups,
        "kv_channels": geometry.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": geometry.norm_epsilon,
        "layernorm_zero_centered_gamma": geometry.zero_centered_norm,
        "qk_layernorm": geometry.qk_layernorm and geometry.latent is None,
        "attention_output_gate": geometry.attention_gate,
        # Layers have names of their own in a checkpoint.
        "hetereogenous_dist_checkpoint": geometry.delta is not None or bool(geometry.shared_index_layers),
        "add_bias_linear": False,
        "add_qkv_bias": geometry.add_qkv_bias,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "attention_dropout": geometry.attention_dropout,
        "hidden_dropout": geometry.hidden_dropout,
        "init_method_std": geometry.init_method_std,
        # Its loss is weighed where ours is summed up, not by megatron-core.
        "mtp_num_layers": geometry.prediction_layers or None,
    }


def _expert_and_latent_options(
    geometry: TransformerGeometry, training: ExpertConfig, layout: Layout, layers: Layers
) -> dict[str, Any]:
    from loongforge.core.megatron.experts import expert_options
    from loongforge.core.megatron.latent_attention import latent_options

    options: dict[str, Any] = {"apply_rope_fusion": True}  # TransformerEngine's, or ours through core.megatron.repairs
    if geometry.experts is not None:
        options |= expert_options(geometry.experts, training, geometry.num_layers, layout, layers)
    if geometry.latent is not None:
        options |= latent_options(geometry.latent, geometry.rotary_base)
    return options


def _layout_options(layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    interleaved = layout.vpp is not None
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "num_layers_in_first_pipeline_stage": layout.first_layers,
        "num_layers_in_last_pipeline_stage": layout.last_layers,
        "context_parallel_size": layout.cp,
        "sequence_parallel": layout.sp,
        "pipeline_dtype": dtype,
        # Two stages with interleaving send twice between the same two ranks in one batch, which batched
        # point-to-point mixes up without an error; the unbatched, overlapped form is right for every size.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _recompute_options(parallel: ParallelConfig) -> dict[str, Any]:
    if parallel.recompute_granularity is None:
        return {}
    if parallel.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": parallel.recompute_method or "uniform",
        "recompute_num_layers": parallel.recompute_num_layers or 1,
    }
