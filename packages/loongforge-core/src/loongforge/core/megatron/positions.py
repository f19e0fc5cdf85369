"""Angles of rotary position embedding, in the forms megatron-core's attention hands to `core.megatron.rope`.

Shapes: S tokens of a sequence on this context parallel rank, B batch, T tokens of a packed row on this rank, R rotated
width of a head (its first channels, or all), whose two halves repeat.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from loongforge.core.megatron.context_parallel import local_indices
from loongforge.core.model.geometry import Llama3Scaling, TransformerGeometry

if TYPE_CHECKING:
    from loongforge.core.megatron.layers import PackedRow


class Rotary:
    """Angles for one micro-batch; not a module, so that no cast of the model to bf16 reaches the frequencies.

    Position ids of one row say a token's place in its sequence or segment, so a table by place serves the whole batch,
    and TransformerEngine's fused rotation takes it. Three rows (time, height, width) give every token its own angles.
    """

    def __init__(self, geometry: TransformerGeometry, cp: dist.ProcessGroup) -> None:
        self.frequencies = frequencies(geometry)
        self.axes = None if geometry.mrope_section is None else axes_of_pairs(geometry)
        self.cp = cp
        self._table: tuple[object, torch.Tensor] | None = None  # text has one length, run after run

    def __call__(
        self, tokens: torch.Tensor, position_ids: torch.Tensor | None, packed: PackedRow | None
    ) -> torch.Tensor:
        """Angles fp32 for `tokens` `[B, S]` and position ids `[B, S]` or `[3, B, S]`.

        One row or none: `[S, 1, 1, R]`, or for a packed row `[longest segment, 1, 1, R]`. Three rows: `[S, B, 1, R]`,
        or for a packed row `[1, T, 1, R]`, which no table by place can be mistaken for.
        """
        if position_ids is not None and position_ids.dim() == 3:
            angles = self._of_tokens(position_ids)
            return angles if packed is None else angles.transpose(0, 1)
        length = (
            tokens.size(1) * self.cp.size() if packed is None else max(b - a for a, b in pairwise(packed.boundaries))
        )
        return self._by_place(length, packed is not None, tokens.device)

    def _of_tokens(self, position_ids: torch.Tensor) -> torch.Tensor:
        assert self.axes is not None, "position ids have three rows, but the geometry has no mrope_section"
        self._move(position_ids.device)
        assert self.axes is not None
        places = position_ids.permute(2, 1, 0).float().index_select(-1, self.axes)
        return _repeat_halves((places * self.frequencies).unsqueeze(2))

    def _by_place(self, length: int, packed: bool, device: torch.device) -> torch.Tensor:
        key = (length, packed, device)
        if self._table is None or self._table[0] != key:
            self._move(device)
            places = torch.arange(length, device=device, dtype=torch.float32)
            if self.cp.size() > 1 and not packed:
                places = places[local_indices((0, length), self.cp.rank(), self.cp.size(), device)]
            self._table = key, _repeat_halves(torch.outer(places, self.frequencies)[:, None, None])
        return self._table[1]

    def _move(self, device: torch.device) -> None:
        self.frequencies = self.frequencies.to(device)
        self.axes = None if self.axes is None else self.axes.to(device)


def frequencies(geometry: TransformerGeometry) -> torch.Tensor:
    """Radians per position of each pair of columns, fp32 `[rotated channels / 2]`."""
    width = geometry.rotated_channels
    plain = 1.0 / geometry.rotary_base ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return plain if geometry.rope_scaling is None else _stretched(plain, geometry.rope_scaling)


def axes_of_pairs(geometry: TransformerGeometry) -> torch.Tensor:
    """Which row of the position ids turns each pair: int64 `[rotated channels / 2]` of 0 time, 1 height, 2 width."""
    section = geometry.mrope_section
    assert section is not None, "the geometry has no mrope_section"
    pairs = geometry.rotated_channels // 2
    assert sum(section) == pairs, f"mrope_section {section} does not add up to the {pairs} pairs of a head"
    if not geometry.mrope_interleaved:
        return torch.arange(3).repeat_interleave(torch.tensor(section))
    axes = torch.zeros(pairs, dtype=torch.int64)
    for axis in (1, 2):  # every third pair, as often as the section says; what is left over is time
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def _stretched(plain: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # within the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def _repeat_halves(angles: torch.Tensor) -> torch.Tensor:
    return torch.cat((angles, angles), dim=-1)
