"""Which groups of experts a token may go to, where megatron-core judges a group by another number of its experts."""

from __future__ import annotations

from typing import Any

import torch


class GroupChoice:
    """Groups are judged by the sum of their `best` experts; the token's experts come from the chosen groups.

    megatron-core sums topk / topk_groups experts of a group, whatever the model was trained with. A router asks the
    object in its `router_replay` for the choice instead, when there is one; nothing is replayed here.
    """

    def __init__(self, best: int) -> None:
        self.best = best
        self.layer_number = 0  # the router tells

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores `[tokens, experts]` to the values and numbers of the chosen experts, both `[tokens, topk]`."""
        assert num_groups is not None, "only set for experts in groups"
        assert group_topk is not None, "given with num_groups"
        groups = scores.unflatten(-1, (num_groups, -1))
        chosen = groups.topk(self.best, dim=-1).values.sum(-1).topk(group_topk, dim=-1).indices
        allowed = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=scores.device).scatter_(-1, chosen, True)
        masked = groups.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
        return masked.topk(topk, dim=-1)
