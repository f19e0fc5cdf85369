"""Losses of routers and what a capacity drops, in plain torch from the papers' definitions."""

from __future__ import annotations

import math

import torch

from loongforge.core.config.experts import ExpertConfig
from loongforge.core.model.geometry import ExpertGeometry


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """ST-MoE (2022), eq. 5: mean over tokens of the squared log-sum-exp; `[samples, S, E]` to a number."""
    return logits.exp().sum(-1).log().square().mean()


def balance(logits: torch.Tensor, experts: ExpertGeometry, *, dp: int, micro_batch: int) -> torch.Tensor:
    """The load-balancing loss of `experts.load_balancing`, 1 when even; `[samples, S, E]` to a number.

    The first samples / dp sequences are the first rank's, `micro_batch` after `micro_batch`.
    """
    scores = logits.sigmoid() if experts.score_function == "sigmoid" else logits.softmax(-1)
    scores = scores / scores.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(experts.topk).indices, 1.0)
    if experts.load_balancing == "seq_aux_loss":  # DeepSeek-V3 (2024), eq. 17 to 20: each sequence by itself
        return torch.stack([_even(chosen[n], scores[n], experts) for n in range(len(logits))]).mean()
    ranks = [
        list(zip(of_rank.split(micro_batch), scores_of_rank.split(micro_batch), strict=True))
        for of_rank, scores_of_rank in zip(chosen.chunk(dp), scores.chunk(dp), strict=True)
    ]
    found: list[torch.Tensor] = []
    for number in range(len(ranks[0])):
        for batches in ranks:
            counted, scored = batches[number]
            if experts.load_balancing == "global_aux_loss":  # all ranks, this micro-batch and those before it
                counted = torch.cat([other[before][0] for other in ranks for before in range(number + 1)])
            found.append(_even(counted, scored, experts))
    return torch.stack(found).mean()


def _even(chosen: torch.Tensor, scores: torch.Tensor, experts: ExpertGeometry) -> torch.Tensor:
    """Switch Transformers (2021), eq. 4 to 6: E x sum over experts of (share of choices x mean score)."""
    share = chosen.flatten(0, -2).mean(0) / experts.topk
    return experts.num_experts * (share * scores.flatten(0, -2).mean(0)).sum()


def within_capacity(
    numbers: torch.Tensor,
    weights: torch.Tensor,
    experts: int,
    moe: ExpertConfig,
    shape: tuple[int, int],
    parts: int,
) -> torch.Tensor:
    """1 for a choice that is kept and 0 for one that is dropped; all `[tokens, topk]`, sequence after sequence.

    GShard (2020), 2.2: tokens are in groups, and an expert takes no more than its capacity from each. A group is one of
    `parts` of the sequences of a micro-batch of `shape` (sequences, length), position after position.
    """
    assert moe.moe_expert_capacity_factor is not None
    samples, length = shape
    kept = torch.zeros_like(weights)
    for first in range(0, len(numbers), samples * length):
        for part in range(parts):
            positions = range(part * length // parts, (part + 1) * length // parts)
            group = [first + sample * length + position for position in positions for sample in range(samples)]
            room = math.ceil(len(group) * numbers.size(1) / experts * moe.moe_expert_capacity_factor)
            for expert in range(experts):
                wanting = [
                    (token, slot)
                    for token in group
                    for slot in range(numbers.size(1))
                    if int(numbers[token, slot]) == expert
                ]
                if moe.moe_token_drop_policy == "probs":
                    wanting.sort(key=lambda place: -weights[place].item())
                for place in wanting[:room]:
                    kept[place] = 1
    return kept
