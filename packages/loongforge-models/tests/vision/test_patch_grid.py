"""Places of patches against transformers' own tables."""

from __future__ import annotations

import pytest
import torch

from loongforge.models.vision.patch_grid import PatchGrid

GRIDS = {
    "mixed": [(1, 6, 10), (3, 4, 6), (1, 2, 2), (2, 14, 8)],
    "one": [(1, 4, 4)],
    "wider than the table": [(1, 18, 30)],
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("merge", [1, 2])
def test_rows_columns_and_frames(grid: list[tuple[int, int, int]], merge: int) -> None:
    from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

    places, table = PatchGrid.of(grid, merge), torch.tensor(grid)
    assert torch.equal(torch.stack([places.rows, places.columns], 1), get_vision_position_ids(table, merge))
    ends = get_vision_cu_seqlens(table).diff()
    assert torch.equal(torch.bincount(places.frames), ends)
    assert torch.equal(places.frames.sort().values, places.frames)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("side", [2, 4, 6])
def test_windows(grid: list[tuple[int, int, int]], side: int) -> None:
    from transformers.vision_utils import get_vision_window_index

    index, ends = get_vision_window_index(torch.tensor(grid), 2, side * 14, 14)
    squares = torch.arange(len(index) * 4).reshape(-1, 4)[index].flatten()
    right = torch.empty(len(index) * 4, dtype=torch.int64)
    right[squares] = torch.arange(len(ends) - 1).repeat_interleave(ends.diff())
    assert torch.equal(PatchGrid.of(grid, 2).windows(side**2), right)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_learned_positions_and_their_gradient(grid: list[tuple[int, int, int]]) -> None:
    from transformers.vision_utils import get_vision_interpolation_indices_and_weights

    table = torch.randn(49, 6, generator=torch.Generator().manual_seed(3)).requires_grad_()
    ours = PatchGrid.of(grid, 2).interpolate(table)
    factors = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4))
    (mine,) = torch.autograd.grad((ours * factors).sum(), table)
    index, weight = get_vision_interpolation_indices_and_weights(
        torch.tensor(grid), 7, mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    right = (table[index] * weight[:, :, None]).sum(1)
    (theirs,) = torch.autograd.grad((right * factors).sum(), table)
    # Sums of four products in another order: a few units in the last place of values up to 4.
    torch.testing.assert_close(ours, right, rtol=0, atol=2e-6)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4)


def test_rotary_angles() -> None:
    """Twelve channels: three pairs turn by row, three by column; their speeds are 1, base^(-1/3), base^(-2/3)."""
    places = PatchGrid.of([(1, 2, 4)], 2)
    angles = places.angles(12, 1000.0, torch.device("cpu"))
    assert angles.shape == (8, 1, 1, 12)
    speeds = torch.tensor([1.0, 0.1, 0.01])
    last = torch.cat([1 * speeds, 3 * speeds]).repeat(2)  # row 1, column 3
    torch.testing.assert_close(angles[-1, 0, 0], last)
