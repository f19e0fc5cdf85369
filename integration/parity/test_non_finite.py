"""A loss or gradient that is not finite stops every rank with the same words, before the update."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import parity_run as run
import pytest
import torch
from parity_run import PP2, TP2_SP, ZERO1

from loongforge.core.config.run import RunConfig
from loongforge.core.errors import TrainingError
from loongforge.core.testing import run_distributed

LAYOUTS = {
    "one": ([], 1, 0), "dp2": ([], 2, 1), "zero1": (ZERO1, 2, 1), "pp2": (PP2, 2, 1), "dp2-tp2": (TP2_SP, 4, 2),
}  # fmt: skip
"""Flags, ranks, and the rank that must be named: micro-batch 1 goes to data parallel rank 1 where there is one."""

INFINITE = 130
"""The last token."""


def attempt(worker: Any, config: RunConfig, poison: str) -> tuple[str, bool]:
    """Step 1 is sound, step 2 is not: the message, and whether weights and schedule stayed as after step 1."""
    from loongforge.ckpt.workers import part_of
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import gather_parameters

    with part_of(config) as part:
        training = run.built(part)
        steps = [[run.random_batch(1, 32, 4 * step + row) for row in range(4)] for step in range(2)]
        for batch in steps[1]:
            batch["tokens"] %= INFINITE
        train_step(part.plan, part.world, training, run.my_part(part, steps[0]), 0)
        gather_parameters(training.chunks)  # with overlap the next forward pass would, and look like an update
        if poison == "loss":
            _break_embedding(part)
        before = [parameter.detach().clone() for chunk in training.chunks for parameter in chunk.parameters()]
        consumed = training.schedule.num_steps
        if poison == "loss":
            steps[1][1]["tokens"][0, 3] = INFINITE
        else:
            _break_backward(part)
        try:
            train_step(part.plan, part.world, training, run.my_part(part, steps[1]), 1)
        except TrainingError as error:
            after = [parameter for chunk in training.chunks for parameter in chunk.parameters()]
            same = all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
            return str(error), same and training.schedule.num_steps == consumed
    raise AssertionError("the step went through")


def _break_embedding(part: Any) -> None:
    """Infinity for one token, which only one micro-batch holds."""
    embedding = getattr(part.model.chunks[0], "embedding", None)
    if embedding is not None:
        table = embedding.word_embeddings
        if table.vocab_start_index <= INFINITE < table.vocab_end_index:
            with torch.no_grad():
                table.weight[INFINITE - table.vocab_start_index] = torch.inf


def _break_backward(part: Any) -> None:
    """Infinity in the gradient of the last norm, on data parallel rank 1 or the only one."""
    for chunk in part.model.chunks:
        norm = getattr(chunk.decoder, "final_layernorm", None)
        if norm is not None and part.world.dp.rank() == part.world.dp.size() - 1:
            norm.weight.register_hook(lambda gradient: gradient + torch.inf)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss(layout: str, megatron: Any, qwen3_untied: Path) -> None:
    flags, world, rank = LAYOUTS[layout]
    config = run.config_of(qwen3_untied, [*flags, "--lr", "1e-2"])
    said = run_distributed(partial(attempt, config=config, poison="loss"), world)
    assert len(set(said)) == 1, said
    message, unchanged = said[0]
    assert unchanged
    assert f"at step 2: rank {rank}, samples 5. Nothing was updated." in message
    assert "loss is " in message
    assert "check_for_nan_in_loss_and_grad=false" in message


@pytest.mark.parametrize("layout", ["one", "dp2", "pp2"])
def test_gradient_norm(layout: str, megatron: Any, qwen3_untied: Path) -> None:
    flags, world, _ = LAYOUTS[layout]
    config = run.config_of(qwen3_untied, [*flags, "--lr", "1e-2"])
    said = run_distributed(partial(attempt, config=config, poison="gradient"), world)
    assert len(set(said)) == 1, said
    message, unchanged = said[0]
    assert unchanged
    assert "gradient norm is " in message
    assert "final_layernorm.weight" in message
    assert "samples 4, 5, 6, 7" in message


def test_it_can_be_switched_off(megatron: Any, qwen3_untied: Path) -> None:
    config = run.config_of(qwen3_untied, ["--no-check-for-nan-in-loss-and-grad"])
    with pytest.raises(AssertionError, match="the step went through"):
        run_distributed(partial(attempt, config=config, poison="loss"), 1)
