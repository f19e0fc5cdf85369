"""No process group outlives a run: one that a forked process inherits waits for ever when it is overwritten."""

from __future__ import annotations

from typing import Any

from loongforge.core.config.run import ParallelConfig
from loongforge.core.testing import run_distributed


def test_remove_groups_left_when_megatron_core_forgets_all_of_its_own() -> None:
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    platform = choose("cpu").platform()
    start_megatron(platform)
    from loongforge.core.megatron.groups import groups_left, join
    from loongforge.core.plan.layout import Layout

    def left(worker: Any) -> tuple[list[str], list[str]]:
        from megatron.core import parallel_state

        destroy, kept = parallel_state.destroy_model_parallel, []

        def watched() -> None:
            destroy()
            kept.extend(groups_left())

        parallel_state.destroy_model_parallel = watched
        with join(Layout.of(ParallelConfig(), 1), worker, platform, 1.0):
            pass
        return kept, groups_left()

    ((kept, after),) = run_distributed(left, 1)
    assert kept, "megatron-core forgets its groups: remove groups_left"
    assert after == []
