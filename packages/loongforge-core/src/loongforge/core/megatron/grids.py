"""The encoder's own process grid, and the ranks it exchanges features with; nothing global is touched."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from loongforge.core.plan.layout import EncoderLayout, Layout

if TYPE_CHECKING:
    from megatron.core.hyper_comm_grid import HyperCommGrid
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a rank of the foundation sits."""

    tp: int
    cp: int
    dp: int
    pp: int

    @classmethod
    def of(cls, rank: int, layout: Layout) -> Seat:
        """megatron-core numbers ranks tp first, then cp, dp, pp."""
        rest, tp = divmod(rank, layout.tp)
        rest, cp = divmod(rest, layout.cp)
        pp, dp = divmod(rest, layout.dp)
        return cls(tp=tp, cp=cp, dp=dp, pp=pp)


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """Ranks that encode the images of some foundation replicas together, in blocks of `tp` neighbours."""

    ranks: tuple[int, ...]
    """Ascending."""
    tp: int
    """Ranks of one block."""
    seats: tuple[Seat, ...]
    """Place of each rank in the foundation."""
    layout: Layout
    """Of the foundation."""

    @property
    def blocks(self) -> int:
        """Copies of the encoder in this domain."""
        return len(self.ranks) // self.tp

    @property
    def replicas(self) -> tuple[int, ...]:
        """Data parallel ranks of the foundation whose images are encoded here."""
        return tuple(sorted({seat.dp for seat in self.seats}))


@dataclass(frozen=True, kw_only=True)
class EncoderRanks:
    """This rank's place in the encoder's grid."""

    layout: EncoderLayout
    groups: ProcessGroupCollection
    domain: Domain
    group: dist.ProcessGroup
    """The domain's ranks, for tensors."""
    control: dist.ProcessGroup
    """The domain's ranks, for words; on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shores:
    """The two grids of a run whose encoder has ranks of its own; what a bridge is built between."""

    encoder: HyperCommGrid
    foundation: HyperCommGrid


def domains(encoder: EncoderLayout, layout: Layout) -> list[Domain]:
    """Every domain. Inline: ranks of the first stage; ahead: of all stages; apart: one copy of the encoder."""
    if encoder.mode == "apart":
        return [
            Domain(
                ranks=tuple(range(encoder.offset + copy * encoder.tp, encoder.offset + (copy + 1) * encoder.tp)),
                tp=encoder.tp,
                seats=(Seat(tp=0, cp=0, dp=copy, pp=0),) * encoder.tp,  # the one that its features go to
                layout=layout,
            )
            for copy in range(encoder.dp)
        ]
    stage = layout.tp * layout.cp * layout.dp
    width = max(encoder.tp, layout.tp * layout.cp)
    stages = range(layout.pp) if encoder.mode == "ahead" else range(1)
    found: list[Domain] = []
    for first in range(0, stage, width):
        ranks = tuple(pp * stage + first + place for pp in stages for place in range(width))
        seats = tuple(Seat.of(rank, layout) for rank in ranks)
        found.append(Domain(ranks=ranks, tp=encoder.tp, seats=seats, layout=layout))
    return found


def join_encoder(encoder: EncoderLayout, layout: Layout, timeout: timedelta) -> EncoderRanks | None:
    """Make the encoder's groups; every rank of the job calls this. None on ranks that hold no encoder."""
    return join_domain(encoder, layout, timeout, encoder_groups(encoder_grid(encoder)))


def join_domain(
    encoder: EncoderLayout, layout: Layout, timeout: timedelta, groups: ProcessGroupCollection | None
) -> EncoderRanks | None:
    """Make the groups over which domains talk; every rank of the job calls this. `groups` are the encoder grid's."""
    mine: tuple[Domain, dist.ProcessGroup, dist.ProcessGroup] | None = None
    gloo = dist.get_backend() == "gloo"
    for domain in domains(encoder, layout):
        ranks = list(domain.ranks)
        group = dist.new_group(ranks, timeout=timeout)
        control = group if gloo else dist.new_group(ranks, timeout=timeout, backend="gloo")
        if isinstance(group, dist.ProcessGroup) and isinstance(control, dist.ProcessGroup):  # this rank is a member
            mine = (domain, group, control)
    if groups is None or mine is None:
        return None
    return EncoderRanks(layout=encoder, groups=groups, domain=mine[0], group=mine[1], control=mine[2])


def encoder_grid(encoder: EncoderLayout) -> HyperCommGrid:
    """`tp x dp` ranks from the offset on, with their groups; every rank of the job calls this."""
    from megatron.core.hyper_comm_grid import HyperCommGrid

    names = ["tp", "cp", "ep", "pp", "dp"]
    grid = HyperCommGrid([encoder.tp, 1, 1, 1, encoder.dp], names, rank_offset=encoder.offset)
    for name in names:
        grid.create_pg(name)
    grid.create_pg(["tp", "dp"])
    return grid


def encoder_groups(grid: HyperCommGrid) -> ProcessGroupCollection | None:
    """megatron-core's collection for an encoder's grid; None outside it."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    if not grid.is_current_rank_in_grid():
        return None
    made = {name: grid.get_pg(name) for name in grid.dim_names}
    everyone, copies, alone = grid.get_pg(["tp", "dp"]), made["dp"], made["pp"]
    return ProcessGroupCollection(
        tp=made["tp"], cp=made["cp"], pp=alone, ep=made["ep"], mp=made["tp"], tp_cp=made["tp"],
        dp=copies, dp_cp=copies, intra_dp_cp=copies, dp_cp_gtp_remat=copies, tp_dp_cp=everyone,
        intra_dist_opt=everyone, expt_tp=alone, expt_dp=copies, intra_expt_dp=copies, tp_ep=alone, tp_ep_pp=made["tp"],
        # Without a group of its own megatron-core would look for the foundation's in its globals.
        embd=alone, pos_embd=alone,
    )  # fmt: skip


def join_apart(
    encoder: EncoderLayout, layout: Layout, timeout: timedelta
) -> tuple[ProcessGroupCollection, EncoderRanks | None, Shores]:
    """Groups of this rank's side, its place in the encoder, and both grids; every rank of the job calls this.

    megatron-core's own globals describe one grid over all ranks, so in this mode they stay unset.
    """
    shores = Shores(encoder=encoder_grid(encoder), foundation=foundation_grid(layout, encoder.offset + encoder.size))
    tower = encoder_groups(shores.encoder)
    foundation = foundation_groups(shores.foundation)
    groups = tower or foundation
    assert groups is not None, "every rank is on one side"
    return groups, join_domain(encoder, layout, timeout, tower), shores


def foundation_grid(layout: Layout, offset: int) -> HyperCommGrid:
    """The foundation's ranks from the offset on, numbered as megatron-core does; every rank of the job calls this."""
    from megatron.core.hyper_comm_grid import HyperCommGrid

    grid = HyperCommGrid([layout.tp, layout.cp, layout.dp, layout.pp], ["tp", "cp", "dp", "pp"], rank_offset=offset)
    for names in DENSE_GROUPS.values():
        grid.create_pg(list(names))
    # megatron-core's optimizer asks for the groups of experts of every model.
    grid.register_view(
        "expert", [layout.etp, layout.ep, layout.expert_dp, layout.pp], ["expt_tp", "ep", "expt_dp", "pp"]
    )
    for names in EXPERT_GROUPS.values():
        grid.create_pg(list(names), view="expert")
    return grid


DENSE_GROUPS = {
    "tp": ("tp",), "cp": ("cp",), "dp": ("dp",), "pp": ("pp",), "dp_cp": ("cp", "dp"), "mp": ("tp", "pp"),
    "tp_cp": ("tp", "cp"), "tp_dp_cp": ("tp", "cp", "dp"), "intra_dist_opt": ("tp", "cp", "dp", "pp"),
}  # fmt: skip
EXPERT_GROUPS = {
    "ep": ("ep",), "expt_tp": ("expt_tp",), "expt_dp": ("expt_dp",), "tp_ep": ("expt_tp", "ep"),
    "tp_ep_pp": ("expt_tp", "ep", "pp"),
}  # fmt: skip


def foundation_groups(grid: HyperCommGrid) -> ProcessGroupCollection | None:
    """megatron-core's collection for the foundation's grid, None outside it; every rank of the job calls this."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    ends: dict[str, dist.ProcessGroup | None] = {"embd": None, "pos_embd": None}
    for stages in grid.get_rank_enum("pp"):  # those that hold the embedding, and its tied copy
        for name, ranks in (("embd", sorted({stages[0], stages[-1]})), ("pos_embd", [stages[0]])):
            group = dist.new_group(ranks)
            if isinstance(group, dist.ProcessGroup):
                ends[name] = group
    if not grid.is_current_rank_in_grid():
        return None
    made = {name: grid.get_pg(list(names)) for name, names in DENSE_GROUPS.items()}
    made |= {name: grid.get_pg(list(names), view="expert") for name, names in EXPERT_GROUPS.items()}
    copies = made["dp_cp"]
    return ProcessGroupCollection(
        **made, **ends, intra_dp_cp=copies, dp_cp_gtp_remat=copies, intra_expt_dp=made["expt_dp"]
    )
