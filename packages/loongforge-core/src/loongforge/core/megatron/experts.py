"""Mixture of experts: megatron-core's options and the layer that stands in for the MLP.

Every expert is an MLP of its own (`mlp.experts.local_experts.{n}`), so that names are the same with and without
TransformerEngine. Parameters of experts that expert parallelism spreads carry `allreduce=False`: their copies are the
ranks of `groups.expt_dp`, and `groups.expt_tp` splits their matrices.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from loongforge.core.megatron.group_choice import GroupChoice
from loongforge.core.model.geometry import ExpertGeometry
from loongforge.core.plan.layout import Layout

if TYPE_CHECKING:
    from loongforge.core.megatron.specs import Layers


GROUP_SCORES = {"best": 1, "best_two": 2}
"""Experts whose scores a group is judged by."""

BALANCE_LOSS = "load_balancing_loss"
"""megatron-core's name of the loss that spreads tokens over experts."""


class Router(TopKRouter):
    """megatron-core's, whose expert bias and token counts stay fp32 when the model is cast.

    Upstream lets the cast to bf16 round the bias, then makes it fp32 again, and counts tokens in bf16: 256 + 1 = 256.
    """

    def __init__(self, *args: Any, experts: ExpertGeometry, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (experts.num_groups or 1) > 1:
            # Not a replay: the one place where a router takes another way to choose.
            self.router_replay = GroupChoice(GROUP_SCORES[experts.group_score])  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def frozen_expert_bias(self) -> bool:
        """Whether the bias stays as loaded: as the router's matrix does."""
        return not self.weight.requires_grad

    @frozen_expert_bias.setter
    def frozen_expert_bias(self, value: bool) -> None:
        """Upstream's constructor says False, before anything can be frozen."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        exact = {name: getattr(self, name) for name in ("expert_bias", "local_tokens_per_expert")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            if before is not None:
                setattr(self, name, before.float().to(getattr(self, name).device))
        return self


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
            experts=partial(_experts, submodules=submodules),
            shared_experts=partial(_shared_experts, submodules=submodules),
            router=partial(Router, experts=experts),
        ),
    )


def _experts(
    num_local_experts: int, config: Any, *, submodules: MLPSubmodules, pg_collection: Any, name: str | None = None
) -> SequentialMLP:
    """The experts of one layer on this rank. Their tokens come from the dispatcher, not split along the sequence."""
    own = copy(config)
    own.sequence_parallel = False  # upstream leaves it out of its computation anyway, with a warning for each matrix
    return SequentialMLP(num_local_experts, own, submodules, pg_collection=pg_collection, name=name)


def _shared_experts(**options: Any) -> SharedExpertMLP:
    with warnings.catch_warnings():
        # Upstream's own class leaves out what its base asks for, and takes the right width from the configuration.
        warnings.filterwarnings("ignore", "MLP requires ffn_hidden_size", DeprecationWarning)
        return SharedExpertMLP(**options)


def expert_options(experts: ExpertGeometry, num_layers: int, layout: Layout, layers: Layers) -> dict[str, Any]:
    """megatron-core's `TransformerConfig` options of a model with experts."""
    dense = experts.first_dense_layers
    return {
        "num_moe_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_layer_freq": [0] * dense + [1] * (num_layers - dense),
        "moe_grouped_gemm": False,
        **_routing_options(experts),
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        # Tensor parallel experts gather what each rank received, of unequal sizes, after the all-to-all. The other
        # dispatcher gathers every rank's tokens instead: equal sizes, more memory.
        "moe_token_dispatcher_type": "alltoall" if layers.uneven_gather or layout.etp == 1 else "allgather",
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
        "moe_router_load_balancing_type": "aux_loss" if experts.aux_loss_coeff > 0 else "none",
        "moe_aux_loss_coeff": experts.aux_loss_coeff,
    }


def weigh_balance_loss(config: Any, loss_tokens: int, tokens: int) -> None:
    """Make the balance loss of this step the mean over its micro-batches, times its factor.

    megatron-core multiplies it by all tokens and divides every gradient by those that count in the loss, which is
    larger by the share of masked tokens. `loss_tokens` of `tokens` count, over the global batch.
    """
    share = loss_tokens / tokens
    config.moe_grad_scale_func = lambda: share


def take_balance_loss(config: Any, groups: ProcessGroupCollection, micro_batches: int) -> float | None:
    """Mean balance loss of a layer (1 is even) since the last call; None in a model without it. Collective.

    `micro_batches` were run by this rank. Counting starts again, so every step calls this.
    """
    if config.moe_router_load_balancing_type == "none":
        return None
    tracker = get_moe_metrics_tracker()
    tracker.ensure_initialized(BALANCE_LOSS, config.num_layers)  # also on a stage without experts
    sums = tracker.metrics[BALANCE_LOSS].values.clone()
    tracker.clear()
    dist.all_reduce(sums, group=groups.pp)
    dist.all_reduce(sums, group=groups.tp_cp)  # each rank has its tokens' part
    dist.all_reduce(sums, group=groups.dp)
    return float(sums.sum()) / (sum(config.moe_layer_freq) * micro_batches * groups.dp.size())
