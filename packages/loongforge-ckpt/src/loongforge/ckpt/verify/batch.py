"""The batch both sides see: made from the seed alone, so that nothing has to be handed over."""

from __future__ import annotations

import torch

from loongforge.core.config.run import RunConfig
from loongforge.core.plan import Plan


def make_batch(config: RunConfig, sequences: int) -> dict[str, torch.Tensor]:
    """Random tokens with their successors as labels; about every fifth position does not count.

    `tokens`, `labels`, `position_ids` int64 and `loss_mask` fp32, each `[sequences, seq_length]`.
    """
    generator = torch.Generator().manual_seed(config.train.seed)
    length, vocabulary = config.train.seq_length, config.model.foundation.geometry.vocab_size
    text = torch.randint(vocabulary, (sequences, length + 1), generator=generator)
    padding = getattr(config.model.foundation.geometry, "pad_token_id", None)
    if padding is not None:  # transformers gives the embedding of this token no gradient, ours is a token like others
        text[text == padding] = (padding + 1) % vocabulary
    mask = (torch.rand(sequences, length, generator=generator) > 0.2).float()
    mask[:, 0] = 1  # at least one position of every sequence counts
    return {
        "tokens": text[:, :-1].contiguous(),
        "labels": text[:, 1:].contiguous(),
        "loss_mask": mask,
        "position_ids": torch.arange(length).expand(sequences, length).contiguous(),
    }


def rows_of(plan: Plan, dp_rank: int) -> list[slice]:
    """Sequences of the batch that a data parallel rank takes, one slice for each of its micro-batches."""
    size = plan.micro_batch_size
    first = [(number * plan.layout.dp + dp_rank) * size for number in range(plan.num_microbatches)]
    return [slice(start, start + size) for start in first]
