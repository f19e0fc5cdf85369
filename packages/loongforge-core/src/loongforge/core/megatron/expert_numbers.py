"""What the routers of a step measured: their losses, and how the tokens spread over experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from loongforge.core.megatron.groups import World
from loongforge.core.megatron.router import Router
from loongforge.core.model.geometry import TransformerGeometry
from loongforge.core.plan.layout import Layout
from loongforge.core.watch.expert_load import ExpertLoad

LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""megatron-core's names of the losses that spread tokens over experts."""

Z_LOSS = "z_loss"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNumbers:
    """One step of all routers, equal on all ranks."""

    balance_loss: float | None
    """Mean over layers and micro-batches, 1 when experts are used evenly; None without such a loss."""
    z_loss: float | None
    """Mean over layers and tokens; None without such a loss."""
    loads: Mapping[int, ExpertLoad]
    """By layer, from 0; layers of multi-token prediction come after the model's."""


def weigh_layer_losses(config: Any, loss_tokens: int, tokens: int) -> None:
    """Make every loss of routers and indexers in this step the mean over its micro-batches, times its factor.

    It is multiplied by all tokens, by megatron-core or where it is made, and every gradient is divided by the tokens
    that count in the loss: the weight is the share of these. `loss_tokens` of `tokens` count, over the global batch.
    """
    # On the device already, where megatron-core would send a number and wait with every micro-batch.
    share = torch.full((1,), loss_tokens / tokens, device=torch.cuda.current_device())
    config.moe_grad_scale_func = lambda: share


def take_expert_numbers(
    chunks: Sequence[Any], geometry: TransformerGeometry, world: World, micro_batches: int, *, z_loss: bool
) -> ExpertNumbers:
    """What was measured since the last call, while training. Collective, one all-reduce over all ranks.

    Every data parallel rank ran `micro_batches`; `chunks` is empty on a rank without a part of the foundation, whose
    `geometry` this is. Counting starts again, so every step calls this.
    """
    experts = geometry.experts
    assert experts is not None, "asked of mixtures of experts only"
    kind = experts.load_balancing if experts.balance_coeff > 0 else "none"
    names = [*([LOSSES[kind]] if kind != "none" else []), *([Z_LOSS] if z_loss else [])]
    layers, width = geometry.num_layers + geometry.prediction_layers, experts.num_experts + 1
    sums = torch.zeros(layers, width + len(names), dtype=torch.float64, device=world.device)
    for router in (module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)):
        if (load := router.take_load()) is not None:
            assert router.layer_number is not None, "numbered when the layer was built"
            sums[router.layer_number - 1 + (geometry.num_layers if router.is_mtp_layer else 0), :width] += load
    tracker = get_moe_metrics_tracker()
    for column, name in enumerate(names, start=width):
        if name in tracker.metrics:  # not on a stage without experts
            sums[:, column] += tracker.metrics[name].values
    tracker.clear()
    if world.size > 1:
        dist.all_reduce(sums)
    return _numbers(sums.cpu(), experts.num_experts, names, world.layout, micro_batches)


def _numbers(
    sums: torch.Tensor, experts: int, names: Sequence[str], layout: Layout, micro_batches: int
) -> ExpertNumbers:
    loads = {
        layer: ExpertLoad.of(row[:experts].tolist(), kept=float(row[experts]))
        for layer, row in enumerate(sums)
        if float(row[:experts].sum())
    }
    means: dict[str, float] = {}
    for column, name in enumerate(names, start=experts + 1):
        # Of a balance loss a rank adds its tokens' part, and of the one over all ranks so for all of them; of the
        # z-loss its own mean.
        parts = {LOSSES["global_aux_loss"]: 1, Z_LOSS: layout.dp * layout.cp * layout.tp}.get(name, layout.dp)
        means[name] = float(sums[:, column].sum()) / (max(len(loads), 1) * micro_batches * parts)
    balance = [value for name, value in means.items() if name != Z_LOSS]
    return ExpertNumbers(balance_loss=balance[0] if balance else None, z_loss=means.get(Z_LOSS), loads=loads)
