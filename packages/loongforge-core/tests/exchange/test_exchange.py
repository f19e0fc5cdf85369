"""Every feature arrives where its token is, and every gradient returns exactly once, on every layout of the encoder."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from loongforge.core.errors import DataError
from loongforge.core.exchange.route import Scene, assign, route, shares
from loongforge.core.megatron.context_parallel import local_indices
from loongforge.core.megatron.grids import Seat, domains
from loongforge.core.model.geometry import EncoderGeometry
from loongforge.core.plan.layout import EncoderLayout, Layout
from loongforge.core.testing import run_distributed

GEOMETRY = EncoderGeometry(
    num_layers=2, hidden_size=3, ffn_hidden_size=7, num_attention_heads=1, patch_dim=5, spatial_merge_size=2,
    normalization="LayerNorm", norm_epsilon=1e-6, gated=False, patch_bias=True, linear_bias=True,
    deepstack_layers=(0,),
)  # fmt: skip
LENGTH, ROWS, SCENES = 16, 2, 3


def layout(tp: int = 1, cp: int = 1, dp: int = 1, pp: int = 1, *, sp: bool = False) -> Layout:
    return Layout(world=tp * cp * dp * pp, tp=tp, cp=cp, dp=dp, pp=pp, vpp=None, ep=1, etp=1, sp=sp)


class Encoder(torch.nn.Module):
    """Without parallelism: patches as they are, on two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(params_dtype=torch.float64)

    def forward(self, pixels: torch.Tensor, grid: Any) -> list[torch.Tensor]:
        return [pixels, pixels.square()]


class Projector(torch.nn.Module):
    """The mean of a square of patches, then a matrix for every level."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.matrix = torch.nn.Parameter(torch.randn(2, GEOMETRY.patch_dim, 4, generator=generator).double())

    def forward(self, hidden: list[torch.Tensor], grid: Any) -> torch.Tensor:
        merged = torch.stack([level.view(-1, 4, GEOMETRY.patch_dim).mean(1) for level in hidden])
        return (merged @ self.matrix).transpose(0, 1)


def new_tower() -> Any:
    from loongforge.core.model.omni import Tower

    return Tower(Encoder(), Projector(), GEOMETRY)


def scenes_of(replica: int, images: str) -> tuple[list[Scene], list[torch.Tensor | None]]:
    """Three micro-batches of unequal images; the second has none unless every one must have the same."""
    generator = np.random.default_rng(replica)
    grids = {
        "mixed": [((1, 2, 4), (1, 4, 4)), (), ((1, 2, 2), (2, 2, 2), (1, 4, 2))],
        "none": [(), (), ()],
        "one huge": [(), ((1, 8, 8),), ()],
    }[images]
    scenes, pixels = [], []
    for mine in grids:
        count = sum(GEOMETRY.features(grid) for grid in mine)
        positions = np.sort(generator.choice(ROWS * LENGTH, size=count, replace=False))
        scenes.append(Scene(grids=mine, positions=positions, rows=ROWS, length=LENGTH, boundaries=(0, LENGTH)))
        patches = sum(t * h * w for t, h, w in mine)
        pixels.append(torch.from_numpy(generator.standard_normal((patches, 5))) if mine else None)
    return scenes, pixels


def weight(replica: int, scene: int) -> torch.Tensor:
    """What the loss multiplies every entry of every place with, `[B, S, levels, width]`."""
    generator = torch.Generator().manual_seed(100 + 10 * replica + scene)
    return torch.randn(ROWS, LENGTH, 2, 4, generator=generator).double()


def reference(dp: int, images: str) -> tuple[dict[tuple[int, int], torch.Tensor], torch.Tensor]:
    """Rows of every scene at their places, and the gradient, in one process."""
    tower = new_tower()
    matrix = tower.image_projector.matrix
    placed = {}
    for replica in range(dp):
        for number, (scene, pixels) in enumerate(zip(*scenes_of(replica, images), strict=True)):
            whole = torch.zeros(ROWS * LENGTH, 2, 4).double()
            if pixels is not None:
                rows = tower(pixels, scene.grids)
                whole = whole.index_copy(0, torch.from_numpy(scene.positions), rows)
                (whole.view(ROWS, LENGTH, 2, 4) * weight(replica, number)).sum().backward()
            placed[replica, number] = whole.detach().view(ROWS, LENGTH, 2, 4)
    return placed, torch.zeros_like(matrix) if matrix.grad is None else matrix.grad


def work(worker: Any, where: Layout, encoder: EncoderLayout, images: str) -> Any:
    """Encode, compare the rows at this rank's places, go backward; the gradient summed over the encoder's copies."""
    from loongforge.core.megatron.grids import join_encoder
    from loongforge.core.model.omni import OmniCombinationModel

    dist.init_process_group("gloo")
    seat = Seat.of(worker.rank, where)
    groups = _tensor_groups(where)
    ranks = join_encoder(encoder, where, timedelta(seconds=60))
    if ranks is None:
        return None
    tower = new_tower()
    omni = OmniCombinationModel(tower, ranks, groups[worker.rank], split=where.sp)
    scenes, pixels = scenes_of(seat.dp, images)
    batches = (
        [(scenes, pixels)] if encoder.mode == "ahead" else [([s], [p]) for s, p in zip(scenes, pixels, strict=True)]
    )
    expected, _ = reference(where.dp, images)
    worst, number = 0.0, 0
    for some, patches in batches:
        features, shared = omni.encode(some, patches)
        loss = 0.0 * features.rows.sum()
        for index in range(len(some)):
            visual = features.visual(index, features.of(index), shared=shared)
            mine, factor = _local(expected[seat.dp, number], seat, where), _local(weight(seat.dp, number), seat, where)
            if seat.pp == 0:
                wrong = (visual.rows.detach() - mine[visual.positions]).abs()
                worst = max(worst, float(wrong.max()) if len(wrong) else 0.0)
                untouched = mine.index_fill(0, visual.positions, 0.0)
                assert not untouched.any(), "a place that needs a feature has none"
                loss = loss + (visual.rows * factor[visual.positions]).sum()
            number += 1
        loss.backward()
    gradient = tower.image_projector.matrix.grad.clone()
    dist.all_reduce(gradient, group=ranks.groups.dp_cp)
    return worst, gradient


def _tensor_groups(where: Layout) -> dict[int, dist.ProcessGroup]:
    """The tensor parallel group of every rank."""
    found = {}
    for first in range(0, where.world, where.tp):
        group = dist.new_group(list(range(first, first + where.tp)))
        found |= dict.fromkeys(range(first, first + where.tp), group)
    return found


def _local(whole: torch.Tensor, seat: Seat, where: Layout) -> torch.Tensor:
    """`[B, S, ...]` as this rank's hidden states `[S_local * B, ...]`."""
    mine = whole[:, local_indices((0, LENGTH), seat.cp, where.cp)].transpose(0, 1)
    if where.sp:
        mine = mine.chunk(where.tp)[seat.tp]
    return mine.reshape(-1, *whole.shape[2:])


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> None:
    """Once, here: the workers inherit it."""
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    start_megatron(choose("cpu").platform())


CASES = {
    "plain": (layout(), EncoderLayout(mode="inline", tp=1, dp=1)),
    "same tp": (layout(tp=2), EncoderLayout(mode="inline", tp=2, dp=1)),
    "same tp, sequence parallel": (layout(tp=2, sp=True), EncoderLayout(mode="inline", tp=2, dp=1)),
    "data parallel over tp": (layout(tp=2), EncoderLayout(mode="inline", tp=1, dp=2)),
    "data parallel over tp x cp, sequence parallel": (
        layout(tp=2, cp=2, sp=True), EncoderLayout(mode="inline", tp=1, dp=4)),
    "encoder tp larger": (layout(dp=2), EncoderLayout(mode="inline", tp=2, dp=1)),
    "encoder tp larger than tp x cp": (layout(cp=2, dp=2), EncoderLayout(mode="inline", tp=4, dp=1)),
    "first stage of two": (layout(tp=2, pp=2), EncoderLayout(mode="inline", tp=1, dp=2)),
    "ahead over pp": (layout(pp=2, dp=2), EncoderLayout(mode="ahead", tp=1, dp=4)),
    "ahead over tp x pp": (layout(tp=2, pp=2), EncoderLayout(mode="ahead", tp=1, dp=4)),
    "ahead, encoder tp 2": (layout(tp=2, cp=2, sp=True), EncoderLayout(mode="ahead", tp=2, dp=2)),
    "ahead, encoder tp over replicas": (layout(pp=2, dp=2), EncoderLayout(mode="ahead", tp=2, dp=2)),
}  # fmt: skip


@pytest.mark.parametrize("images", ["mixed", "none", "one huge"])
@pytest.mark.parametrize("case", CASES)
def test_arrives_and_returns_once(case: str, images: str) -> None:
    where, encoder = CASES[case]
    told = run_distributed(partial(work, where=where, encoder=encoder, images=images), where.world)
    expected = reference(where.dp, images)[1]
    holders = [one for one in told if one is not None]
    assert len(holders) == encoder.size
    for worst, gradient in holders:
        assert worst < 1e-12
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_a_domain_encodes_whole_replicas() -> None:
    found = domains(EncoderLayout(mode="ahead", tp=1, dp=8), layout(tp=2, dp=2, pp=2))
    assert [domain.ranks for domain in found] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert [domain.replicas for domain in found] == [(0,), (1,)]
    (wide,) = domains(EncoderLayout(mode="inline", tp=4, dp=1), layout(tp=2, dp=2))
    assert wide.replicas == (0, 1)


def test_dear_items_go_apart() -> None:
    chosen = assign([1.0, 8.0, 2.0, 7.0], 2)
    assert chosen[1] != chosen[3]
    assert {
        round(sum(c for c, b in zip([1.0, 8.0, 2.0, 7.0], chosen, strict=True) if b == block)) for block in (0, 1)
    } == {9}


def test_shares_are_even() -> None:
    assert shares(7, 3) == [0, 3, 5, 7]
    assert shares(1, 3) == [0, 1, 1, 1]


def test_positions_and_features_must_agree() -> None:
    scene = Scene(grids=((1, 2, 2),), positions=np.array([3, 4]), rows=1, length=LENGTH, boundaries=(0, LENGTH))
    (domain,) = domains(EncoderLayout(mode="inline", tp=1, dp=1), layout())
    with pytest.raises(AssertionError, match="as many positions"):
        route([[scene]], domain, GEOMETRY, split=False)


@pytest.mark.parametrize(
    ("places", "patches", "wrong"),
    [
        ([3], 12, "1 visual_positions for the 3 features of 2 items"),
        ([3, 4, 5, 9], 12, "4 visual_positions for the 3 features of 2 items"),
        ([3, 4, 5], 8, "8 pixels for the 12 patches of 2 items"),
    ],
)
def test_a_source_that_miscounts_is_told_of_its_samples(places: list[int], patches: int, wrong: str) -> None:
    from loongforge.core.step.visual import scene_of

    batch = {
        "tokens": torch.zeros(1, LENGTH, dtype=torch.int64),
        "grid": torch.tensor([[1, 2, 2], [1, 2, 4]]),
        "visual_positions": torch.tensor(places),
        "pixels": torch.zeros(patches, GEOMETRY.patch_dim),
        "sample_ids": torch.tensor([7]),
    }
    with pytest.raises(DataError, match=rf"samples \[7\]: {wrong}; their data source must"):
        scene_of(batch, GEOMETRY)
    sound = {**batch, "visual_positions": torch.tensor([3, 4, 5]), "pixels": torch.zeros(12, GEOMETRY.patch_dim)}
    assert scene_of(sound, GEOMETRY).grids == ((1, 2, 2), (1, 2, 4))


def test_micro_batches_wait_on_all_stages() -> None:
    (domain,) = domains(EncoderLayout(mode="ahead", tp=1, dp=4), layout(tp=2, pp=2))
    ways = route([scenes_of(0, "mixed")[0]], domain, GEOMETRY, split=False, stages=2)
    stages = np.array([seat.pp for seat in domain.seats])[ways.target]
    assert (stages == ways.scene % 2).all()
    assert set(ways.target.tolist()) == {0, 1}, "the micro-batches with images are 0 and 2"
