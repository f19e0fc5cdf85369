"""The loss is the mean over the unmasked tokens of the global batch, however the batch is spread."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import parity_run as run
import pytest
from parity_run import CP2, Batch

from loongforge.core.testing import fp32_tolerance

LENGTH = 32


def unequal() -> list[Batch]:
    """Four sequences of which 1, 30, 8 and 0 tokens count."""
    batches = [run.random_batch(1, LENGTH, seed, keep=1.0) for seed in range(4)]
    for batch, count in zip(batches, (1, 30, 8, 0), strict=True):
        batch["loss_mask"][:, count:] = 0
    return batches


def in_pairs(batches: list[Batch]) -> list[Batch]:
    """The same sequences, two to a micro-batch."""
    import torch

    pairs = zip(batches[::2], batches[1::2], strict=True)
    return [{name: torch.cat([left[name], right[name]]) for name in left} for left, right in pairs]


@pytest.fixture(scope="module")
def expected(qwen3_untied: Path) -> run.Result:
    return run.transformers_alone(qwen3_untied, unequal())


@pytest.mark.parametrize(
    ("flags", "world", "mbs"),
    [([], 1, 1), ([], 1, 2), ([], 2, 1), ([], 2, 2), (CP2, 2, 1), (["--overlap-grad-reduce"], 2, 1)],
    ids=["dp1-mbs1", "dp1-mbs2", "dp2-mbs1", "dp2-mbs2", "cp2-mbs1", "dp2-overlap"],
)
def test_same_loss_and_gradients(
    flags: list[str], world: int, mbs: int, megatron: Any, qwen3_untied: Path, expected: run.Result, tmp_path: Path
) -> None:
    config = run.config_of(qwen3_untied, flags, mbs=mbs)
    found = run.gradients(config, world, in_pairs(unequal()) if mbs == 2 else unequal(), tmp_path)
    assert found.loss_tokens == expected.loss_tokens == [39]
    assert found.losses == pytest.approx(expected.losses, rel=fp32_tolerance(1e-6))
    assert run.worst(found.tensors, expected.tensors) < (fp32_tolerance(2e-5), "")


@pytest.mark.parametrize("flags", [[], CP2], ids=["dp2", "cp2"])
def test_global_batch_without_a_token_that_counts(
    flags: list[str], megatron: Any, qwen3_untied: Path, tmp_path: Path
) -> None:
    """Loss 0, gradients 0, no division by 0; weight decay off, so nothing moves."""
    batches = unequal()
    for batch in batches:
        batch["loss_mask"][:] = 0
    config = run.config_of(qwen3_untied, [*flags, "--weight-decay", "0", "--lr", "1e-2"])
    found = run.steps(config, 2, [batches], tmp_path)
    assert (found.losses, found.loss_tokens, found.norms) == ([0.0], [0], [0.0])
    assert run.worst(found.tensors, run.read(qwen3_untied))[0] == 0.0
    assert not any(math.isnan(float(tensor.sum())) for tensor in found.tensors.values())
