"""Where the patches of images and videos stand: rows and columns, frames, windows, learned and rotary positions.

An item is `(t, h, w)` patches. Its patches come frame by frame, and in a frame square by square: the `merge x merge`
patches that become one token of the foundation are neighbours. P patches of all items, one item after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch
import torch.nn.functional as F

from loongforge.core.platform.sending import sent

Grid = Sequence[tuple[int, int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchGrid:
    """Every patch's place, int64 `[P]` each, on the host."""

    rows: torch.Tensor
    columns: torch.Tensor
    heights: torch.Tensor
    """Rows of the frame that the patch is in."""
    widths: torch.Tensor
    """Columns of the frame that the patch is in."""
    frames: torch.Tensor
    """Number of that frame over all items."""

    @classmethod
    def of(cls, grid: Grid, merge: int) -> PatchGrid:
        """The patches of all items; heights and widths are multiples of `merge`."""
        assert all(h % merge == 0 and w % merge == 0 for _, h, w in grid), f"{grid} is not made of {merge}-squares"
        sizes = torch.tensor(list(grid), dtype=torch.int64).reshape(-1, 3)
        frame = sizes[:, 1:].repeat_interleave(sizes[:, 0], 0)  # [frames, 2]
        count = frame.prod(1)
        heights, widths = (frame[:, side].repeat_interleave(count) for side in (0, 1))
        place = torch.arange(len(heights)) - (count.cumsum(0) - count).repeat_interleave(count)
        square, inside = place // merge**2, place % merge**2
        across = widths // merge
        return cls(
            rows=square // across * merge + inside // merge,
            columns=square % across * merge + inside % merge,
            heights=heights,
            widths=widths,
            frames=torch.arange(len(frame)).repeat_interleave(count),
        )

    def windows(self, patches: int) -> torch.Tensor:
        """Number of the window that each patch is in: `patches` a full one, smaller at the right and lower edge."""
        side = isqrt(patches)
        across, down = (-(-size // side) for size in (self.widths, self.heights))
        of_frame = torch.zeros(int(self.frames[-1]) + 1 if len(self.frames) else 0, dtype=torch.int64)
        of_frame[self.frames] = across * down
        before = of_frame.cumsum(0) - of_frame
        return before[self.frames] + self.rows // side * across + self.columns // side

    def angles(self, channels: int, base: float, device: torch.device) -> torch.Tensor:
        """Rotary angles fp32 `[P, 1, 1, channels]`, halves equal: the first pairs turn by row, the others by column."""
        steps = torch.arange(0, channels // 2, 2, dtype=torch.float32, device=device)
        speeds = 1.0 / base ** (steps / (channels // 2))
        places = sent(torch.stack([self.rows, self.columns], 1).float(), device)
        half = (places[:, :, None] * speeds).flatten(1)
        return torch.cat([half, half], -1)[:, None, None]

    def interpolate(self, table: torch.Tensor) -> torch.Tensor:
        """Learned positions `[side^2, H]`, stretched over each frame from corner to corner, to fp32 `[P, H]`."""
        side = isqrt(table.size(0))
        first, weight = zip(
            *(_between(*axis, side) for axis in ((self.rows, self.heights), (self.columns, self.widths))), strict=True
        )
        indices: list[torch.Tensor] = []
        shares: list[torch.Tensor] = []
        for down in (0, 1):
            for right in (0, 1):
                indices.append((first[0] + down).clamp(max=side - 1) * side + (first[1] + right).clamp(max=side - 1))
                shares.append((weight[0] if down else 1 - weight[0]) * (weight[1] if right else 1 - weight[1]))
        corners = zip(*(sent(torch.stack(each), table.device) for each in (indices, shares)), strict=True)
        parts = [F.embedding(index, table) * share[:, None] for index, share in corners]
        return parts[0] + parts[1] + parts[2] + parts[3]


def _between(place: torch.Tensor, size: torch.Tensor, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The table's entry before a place, int64, and the share of the next one, fp32; the ends meet the table's ends."""
    exact = place.to(torch.float32) * (side - 1) / (size - 1).clamp(min=1)
    before = exact.floor()
    return before.to(torch.int64), exact - before
