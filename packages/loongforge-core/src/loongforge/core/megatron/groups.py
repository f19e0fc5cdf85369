"""Process groups of the run, made once and handed on explicitly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from loongforge.core.env import Worker
from loongforge.core.megatron.grids import EncoderRanks, Shores, join_apart, join_encoder
from loongforge.core.plan.layout import EncoderLayout, Layout
from loongforge.core.platform import Platform

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among all, and the groups it belongs to."""

    rank: int
    size: int
    local_rank: int
    layout: Layout
    platform: Platform
    device: torch.device
    groups: ProcessGroupCollection
    control: dist.ProcessGroup
    """A CPU group over all ranks, for words rather than tensors."""
    encoder: EncoderRanks | None = None
    """Place in the encoder's grid; None where there is no encoder."""
    shores: Shores | None = None
    """Both grids of a run whose encoder has ranks of its own; `groups` are then those of this rank's side."""

    @property
    def tp(self) -> dist.ProcessGroup:
        """Tensor parallel group."""
        return self.groups.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        """Pipeline group."""
        return self.groups.pp

    @property
    def cp(self) -> dist.ProcessGroup:
        """Context parallel group."""
        return self.groups.cp

    @property
    def dp(self) -> dist.ProcessGroup:
        """Data parallel group."""
        return self.groups.dp

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        """Data and context parallel group: everyone who holds a copy of the same parameters."""
        return self.groups.dp_cp

    @property
    def encodes(self) -> bool:
        """Whether this rank ever runs the encoder, and so needs the patches of images."""
        return self.encoder is not None

    @property
    def holds_foundation(self) -> bool:
        """Whether this rank has a part of the foundation: all do, unless the encoder has ranks of its own."""
        return self.shores is None or self.encoder is None

    @property
    def encoder_groups(self) -> ProcessGroupCollection | None:
        """Groups of the encoder and its projector; None on a rank that holds neither."""
        return self.encoder.groups if self.encoder else None

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that speaks."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """First pipeline stage."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Last pipeline stage."""
        return self.pp.rank() == self.pp.size() - 1

    def barrier(self) -> None:
        """Every rank meets here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def gather(self, value: Any) -> list[Any]:
        """One picklable value from every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def total(self, count: int) -> int:
        """A sum over all ranks, on every rank."""
        if self.size == 1:
            return count
        number = torch.tensor([count])
        dist.all_reduce(number, group=self.control)
        return int(number)

    def agree(self, problems: list[str]) -> list[str]:
        """The problems of all ranks, without repeats, so that all can raise the same error."""
        return list(dict.fromkeys(problem for part in self.gather(problems) for problem in part))


@contextmanager
def join(
    layout: Layout,
    worker: Worker,
    platform: Platform,
    timeout_minutes: float,
    encoder: EncoderLayout | None = None,
) -> Iterator[World]:
    """Make all groups of the layout; they and megatron-core's globals end with the block."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.bridge_communicator import BridgeCommunicator
    from megatron.core.process_groups_config import ProcessGroupCollection

    device = platform.device(worker.local_rank)
    timeout = timedelta(minutes=timeout_minutes)
    backend = platform.backend if platform.backend == "gloo" else f"cpu:gloo,{platform.device_type}:{platform.backend}"
    if worker.world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=worker.rank, world_size=worker.world_size, timeout=timeout)
    apart = encoder if encoder is not None and encoder.mode == "apart" else None
    shores: Shores | None = None
    try:
        if apart is not None:
            groups, place, shores = join_apart(apart, layout, timeout)
            # Sequence parallel layers gather into it; only initialize_model_parallel would make it.
            parallel_state._set_global_memory_buffer()
            # The last stage's copy of a tied embedding asks for it when it describes itself for a checkpoint.
            parallel_state.set_data_parallel_rank(groups.dp_cp.rank())
        else:
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                virtual_pipeline_model_parallel_size=layout.vpp,
                context_parallel_size=layout.cp,
                expert_model_parallel_size=layout.ep,
                expert_tensor_parallel_size=layout.etp,
                distributed_timeout_minutes=max(1, int(timeout_minutes)),
            )
            groups = ProcessGroupCollection.use_mpu_process_groups()
            place = join_encoder(encoder, layout, timeout) if encoder else None
        control = dist.group.WORLD if platform.backend == "gloo" else dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup), "every rank is a member of the group over all"
        yield World(
            rank=worker.rank,
            size=worker.world_size,
            local_rank=worker.local_rank,
            layout=layout,
            platform=platform,
            device=device,
            groups=groups,
            control=control,
            encoder=place,
            shores=shores,
        )
    finally:
        if shores is not None:
            BridgeCommunicator.destroy_broadcast_pgs()  # kept by the class, across runs
            BridgeCommunicator.destroy_bridge_pgs()
            parallel_state.set_data_parallel_rank(None)  # kept by destroy_model_parallel
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        for name in groups_left():
            setattr(parallel_state, name, None)


def groups_left() -> list[str]:
    """Globals of megatron-core that hold a process group.

    Why: `destroy_model_parallel` keeps some. A process that is forked later overwrites them, and gloo's destructor then
    waits for ever for threads that this process does not have. How: they are set to None with the rest.
    Upstream: parallel_state.py destroy_model_parallel, `_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP`. Remove when: it
    leaves none.
    """
    from megatron.core import parallel_state

    return [name for name, value in vars(parallel_state).items() if isinstance(value, dist.ProcessGroup)]
