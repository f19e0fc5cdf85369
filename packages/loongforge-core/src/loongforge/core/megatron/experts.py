"""Mixture of experts: megatron-core's options and the layer that stands in for the MLP.

Every expert is an MLP of its own (`mlp.experts.local_experts.{n}`), so that names are the same with and without
TransformerEngine. Parameters of experts that expert parallelism spreads carry `allreduce=False`: their copies are the
ranks of `groups.expt_dp`, and `groups.expt_tp` splits their matrices.
"""

from __future__ import annotations

import warnings
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from loongforge.core.config.experts import ExpertConfig
from loongforge.core.errors import ConfigError
from loongforge.core.megatron.grouped_experts import GroupedExperts
from loongforge.core.megatron.router import Router
from loongforge.core.model.geometry import ExpertGeometry
from loongforge.core.plan.layout import Layout

if TYPE_CHECKING:
    from loongforge.core.megatron.specs import Layers


def mlp_submodules(layers: Layers) -> MLPSubmodules:
    """Matrices and activation of a gated MLP, an expert's or a layer's."""
    return MLPSubmodules(
        linear_fc1=layers.column_linear, linear_fc2=layers.row_linear, activation_func=layers.activation
    )


def experts_builder(layers: Layers, experts: ExpertGeometry) -> Any:
    """Builds router, experts and the shared expert in place of a layer's MLP."""
    submodules = mlp_submodules(layers)
    return partial(
        MoELayer,
        submodules=MoESubmodules(
            experts=partial(_experts, submodules=submodules, layers=layers),
            shared_experts=partial(_shared_experts, submodules=submodules),
            router=partial(Router, experts=experts),
        ),
    )


def _experts(
    num_local_experts: int,
    config: Any,
    *,
    submodules: MLPSubmodules,
    layers: Layers,
    pg_collection: Any,
    name: str | None = None,
) -> SequentialMLP:
    """The experts of one layer on this rank. Their tokens come from the dispatcher, not split along the sequence."""
    own = copy(config)
    own.sequence_parallel = False  # upstream leaves it out of its computation anyway, with a warning for each matrix
    kind = partial(GroupedExperts, ops=layers.grouped()) if config.moe_grouped_gemm else SequentialMLP
    return kind(num_local_experts, own, submodules, pg_collection=pg_collection, name=name)


def _shared_experts(**options: Any) -> SharedExpertMLP:
    with warnings.catch_warnings():
        # Upstream's own class leaves out what its base asks for, and takes the right width from the configuration.
        warnings.filterwarnings("ignore", "MLP requires ffn_hidden_size", DeprecationWarning)
        return SharedExpertMLP(**options)


def expert_options(
    experts: ExpertGeometry, training: ExpertConfig, num_layers: int, layout: Layout, layers: Layers
) -> dict[str, Any]:
    """megatron-core's `TransformerConfig` options of a model with experts.

    Raises `ConfigError` for a dispatcher whose exchange the platform's collectives cannot do.
    """
    dense = experts.first_dense_layers
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_shared_expert_overlap": training.moe_shared_expert_overlap,
        "moe_layer_freq": [0] * dense + [1] * (num_layers - dense),
        "moe_grouped_gemm": layers.groups_experts(training),
        **_routing_options(experts),
        **_loss_options(experts, training),
        "moe_expert_capacity_factor": training.moe_expert_capacity_factor,
        "moe_token_drop_policy": training.moe_token_drop_policy,
        "moe_pad_expert_input_to_capacity": training.moe_pad_expert_input_to_capacity,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "moe_token_dispatcher_type": _dispatcher(training, layout, layers),
    }


def _dispatcher(training: ExpertConfig, layout: Layout, layers: Layers) -> str:
    """Tensor parallel experts gather what each rank received, of unequal sizes, after the all-to-all. The other
    dispatcher gathers every rank's tokens instead: equal sizes, more memory."""
    asked = training.moe_token_dispatcher_type
    if layers.uneven_gather or layout.etp == 1:
        return asked or "alltoall"
    needing = [
        name for name in ("moe_shared_expert_overlap", "moe_pad_expert_input_to_capacity") if getattr(training, name)
    ]
    if asked == "alltoall" or needing:
        what = "moe_token_dispatcher_type='alltoall'" if asked else f"{needing[0]}=True"
        raise ConfigError(
            f"moe.{what} with expert_tensor_parallel_size={layout.etp} gathers tensors of unequal sizes, which this "
            "platform's collectives cannot: use --expert-tensor-parallel-size 1."
        )
    return "allgather"


def _loss_options(experts: ExpertGeometry, training: ExpertConfig) -> dict[str, Any]:
    return {
        "moe_router_load_balancing_type": experts.load_balancing if experts.balance_coeff > 0 else "none",
        "moe_aux_loss_coeff": experts.balance_coeff,
        "moe_z_loss_coeff": training.moe_z_loss_coeff or None,
    }


def _routing_options(experts: ExpertGeometry) -> dict[str, Any]:
    softmax = experts.score_function == "softmax"
    return {
        "moe_router_topk": experts.topk,
        "moe_router_score_function": experts.score_function,
        # Softmax over the chosen logits is the normalised softmax over all; a sigmoid's scores are normalised anyway.
        "moe_router_pre_softmax": softmax and not experts.normalise_topk,
        "moe_router_topk_scaling_factor": None if experts.scaling == 1.0 else experts.scaling,
        "moe_router_num_groups": experts.num_groups,
        "moe_router_group_topk": experts.topk_groups,
        "moe_router_enable_expert_bias": experts.expert_bias,
        "moe_router_bias_update_rate": experts.bias_update_rate,
        "moe_router_dtype": "fp32",
    }
