"""The router of experts: whom a token goes to, what is dropped, and the losses that training adds for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from loongforge.core.megatron.group_choice import GroupChoice
from loongforge.core.model.geometry import ExpertGeometry

GROUP_SCORES = {"best": 1, "best_two": 2}
"""Experts whose scores a group is judged by."""


class Router(TopKRouter):
    """megatron-core's, with four differences.

    The expert bias and token counts stay fp32 when the model is cast: upstream lets the cast to bf16 round the bias,
    then makes it fp32 again, and counts tokens in bf16: 256 + 1 = 256. The load-balancing loss counts the choices that
    were made where groups of experts limit them, and the one over all ranks weighs as the others do. Tokens beyond the
    capacity are dropped here, after the losses and the counting, which see what the router wants.
    """

    def __init__(self, *args: Any, experts: ExpertGeometry, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        whole = self.config
        self.config = copy(whole)
        self.config.moe_expert_capacity_factor = None  # upstream drops before it counts
        self.capacity_factor = whole.moe_expert_capacity_factor
        self.by_position = whole.moe_token_drop_policy == "position"
        self.pads = whole.moe_pad_expert_input_to_capacity
        self.load: torch.Tensor | None = None
        """Choices of every expert since `take_load`, and the choices kept: int64 `[experts + 1]`."""
        if (experts.num_groups or 1) > 1:
            # Not a replay: the one place where a router takes another way to choose.
            self.router_replay = GroupChoice(GROUP_SCORES[experts.group_score])  # pyright: ignore[reportAttributeAccessIssue]
        self.counts_own_choice = (experts.num_groups or 1) > 1 and not experts.expert_bias

    def routing(self, logits: torch.Tensor, padding_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[s, b, experts]` to weights and the map of what is sent where, both `[s x b, experts]`."""
        weights, chosen = super().routing(logits, padding_mask=padding_mask)
        sent = kept = chosen
        if self.capacity_factor is not None:
            capacity = math.ceil(chosen.size(0) * self.topk / chosen.size(1) * self.capacity_factor)
            kept = within_capacity(weights.detach(), chosen, capacity, by_position=self.by_position)
            weights = weights * kept
            sent = filled(kept, capacity) if self.pads else kept
        if self.training and torch.is_grad_enabled():  # not again where activations are recomputed
            counts = torch.cat([chosen.sum(0), kept.sum()[None]])
            self.load = counts if self.load is None else self.load + counts
        return weights, sent

    def take_load(self) -> torch.Tensor | None:
        """What `load` holds; counting starts again."""
        load, self.load = self.load, None
        return load

    def _apply_aux_loss(self, probs: Any, scores_for_aux_loss: Any, routing_map: Any, *rest: Any, **named: Any) -> Any:
        return super()._apply_aux_loss(probs, scores_for_aux_loss, self._counted(probs, routing_map), *rest, **named)

    def _apply_seq_aux_loss(
        self, probs: Any, scores_for_aux_loss: Any, routing_map: Any, *rest: Any, **named: Any
    ) -> Any:
        chosen = self._counted(probs, routing_map)
        return super()._apply_seq_aux_loss(probs, scores_for_aux_loss, chosen, *rest, **named)

    def _apply_global_aux_loss(
        self, probs: Any, scores_for_aux_loss: Any, routing_map: Any, *rest: Any, **named: Any
    ) -> Any:
        chosen = self._counted(probs, routing_map)
        return super()._apply_global_aux_loss(probs, scores_for_aux_loss, chosen, *rest, **named)

    def _counted(self, weights: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """The choices that the loss counts: `best`, those of the highest scores as DeepSeek-V3 defines it, whatever the
        bias chose; or those that were made, as DeepSeek-V2 does."""
        return weights.detach() > 0 if self.counts_own_choice else best

    def attach_and_log_load_balancing_loss(
        self, *args: Any, needs_dp_avg: bool = True, valid_token_count: Any = None, **named: Any
    ) -> Any:
        """The loss over all ranks is a mean over data parallel ranks already, where those of each rank are added up."""
        if not needs_dp_avg:
            valid_token_count = valid_token_count * (self.tp_dp_cp_group.size() // self.tp_cp_group.size())
        return super().attach_and_log_load_balancing_loss(
            *args, needs_dp_avg=needs_dp_avg, valid_token_count=valid_token_count, **named
        )

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


def within_capacity(weights: torch.Tensor, chosen: torch.Tensor, capacity: int, *, by_position: bool) -> torch.Tensor:
    """Of the choices `[tokens, experts]` those that an expert takes: at most `capacity`, the first or the heaviest."""
    if by_position:
        return chosen & (chosen.cumsum(0) <= capacity)
    best = weights.masked_fill(~chosen, -1.0).topk(min(capacity, chosen.size(0)), dim=0).indices
    return chosen & torch.zeros_like(chosen).scatter(0, best, True)


def filled(kept: torch.Tensor, capacity: int) -> torch.Tensor:
    """`kept` with as many other tokens as make `capacity` for each expert; their weight is 0."""
    order = kept.int().argsort(dim=0, descending=True, stable=True)[:capacity]
    return torch.zeros_like(kept).scatter(0, order, True)
