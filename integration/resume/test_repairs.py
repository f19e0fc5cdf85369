"""The repairs of megatron-core that a resume needs, each shown to be needed still.

When one of these tests fails, megatron-core has changed: look whether the repair it names can go, then delete both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ZERO1 = ["--use-distributed-optimizer"]


@pytest.fixture(scope="module")
def sharded(tied: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the distributed optimizer on one process; never changed by a test."""
    run = tmp_path_factory.mktemp("sharded") / "run"
    tied.train(run, ZERO1)
    return run


def test_remove_separate_steps_when_a_resume_is_right_without_it(tied: Any, sharded: Path, tmp_path: Path) -> None:
    def without(_: Any) -> None:
        from loongforge.core.checkpoint import optimizer_state

        optimizer_state._separate_steps = lambda optimizer: None

    run = tied.back(sharded, tmp_path / "run")
    tied.train(run, ZERO1, before=without)
    right, wrong = tied.curve(sharded), tied.curve(run)
    assert wrong[3] == right[3]  # the first step after the load still uses the weights as they were
    assert abs(wrong[5][1] - right[5][1]) > 1e-4


def test_remove_prime_when_a_fresh_optimizer_can_be_loaded_without_it(tied: Any, sharded: Path, tmp_path: Path) -> None:
    def without(_: Any) -> None:
        from loongforge.core.checkpoint import optimizer_state

        optimizer_state._prime = lambda optimizer: None

    run = tied.back(sharded, tmp_path / "run")
    with pytest.raises(AssertionError, match=r"distrib_optimizer\.py"):
        tied.outcomes(run, ZERO1, before=without)


def test_remove_with_step_when_the_distributed_optimizer_loads_without_it(
    tied: Any, sharded: Path, tmp_path: Path
) -> None:
    def without(_: Any) -> None:
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        from loongforge.core.platform.substitution import ORIGINAL

        name = "_set_main_param_and_optimizer_states"
        repaired = getattr(DistributedOptimizer, name)
        original = getattr(repaired, ORIGINAL)

        def unrepaired(self: Any, *arguments: Any) -> Any:
            return original(self, *arguments)

        vars(unrepaired).update(vars(repaired))  # its marks, so that the trainer does not install it again
        setattr(DistributedOptimizer, name, unrepaired)

    run = tied.back(sharded, tmp_path / "run")
    with pytest.raises(AssertionError, match=r"KeyError: 'step'"):
        tied.outcomes(run, ZERO1, before=without)


def test_remove_padding_kept_when_state_behind_a_padded_bucket_is_saved_right_without_it(
    tied: Any, tmp_path: Path
) -> None:
    def without(_: Any) -> None:
        from contextlib import nullcontext

        from loongforge.core.checkpoint import optimizer_state

        optimizer_state.padding_kept = lambda optimizer: nullcontext()

    # The copy of the tied embedding has a bucket of its own on the last stage, 131 x 48 numbers and padding.
    flags = [*ZERO1, "--pipeline-model-parallel-size", "2"]
    tied.train(tmp_path / "run", flags, 2, before=without)
    run = tied.back(tmp_path / "run", tmp_path / "resumed")
    tied.train(run, flags, 2)
    assert abs(tied.curve(run)[3][1] - tied.curve(tmp_path / "run")[3][1]) > 1e-4
