"""Full attention inside the segments of one row: frames of images and videos, or windows of their patches.

Shapes: T patches of all items, N heads of this tensor parallel rank, D head width. A row is `[T, 1, N, D]` for
megatron-core; its layers hand `packed_seq_params` down to core attention unread, and so the segments arrive with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from loongforge.core.platform.sending import sent
from loongforge.kernels.packed_attention import Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """The parts of a row, arranged so that parts of one length stand together and attend in one call."""

    shapes: tuple[tuple[int, int], ...]
    """(number of segments, their length) of each call, in the arranged order."""
    order: torch.Tensor | None
    """int64 `[T]` from the row's order to the arranged one; None where they are the same."""
    back: torch.Tensor | None
    """int64 `[T]`, the inverse."""
    parts: Parts
    """The same segments, one by one, for a kernel that takes them all."""

    @classmethod
    def of(cls, numbers: torch.Tensor, device: torch.device) -> Segments:
        """Tokens with one number are one segment, wherever they stand; int64 `[T]` on the host, from 0 without gaps.

        The index tensors are made on `device`.
        """
        sizes = torch.bincount(numbers)
        assert len(sizes) > 0, "a row without tokens"
        assert bool((sizes > 0).all()), "a segment without tokens"
        arranged = torch.argsort(sizes, descending=True, stable=True)
        lengths = ((length, len(list(run))) for length, run in groupby(sizes[arranged].tolist()))
        shapes = tuple((count, int(length)) for length, count in lengths)
        parts = Parts.of(sizes[arranged].tolist(), sizes[arranged].tolist(), device)
        place = torch.argsort(arranged)  # of each segment among the arranged ones
        order = torch.argsort(place[numbers], stable=True)
        if torch.equal(order, torch.arange(len(order))):
            return cls(shapes=shapes, order=None, back=None, parts=parts)
        back = sent(torch.argsort(order), device)
        return cls(shapes=shapes, order=sent(order, device), back=back, parts=parts)

    def arranged(self) -> Segments:
        """The segments of the row that `order` makes of this one."""
        return Segments(shapes=self.shapes, order=None, back=None, parts=self.parts)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None,
        packed_attention: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`[T, N, D]` each to `[T, N, D]`; no token sees another segment.

        `packed_attention` takes all segments in one launch; without it those of one length are a call of torch's.
        """
        if self.order is not None:
            query, key, value = (tensor[self.order] for tensor in (query, key, value))
        if packed_attention is None:
            row = self._by_length(query, key, value, scale)
        else:
            scale = query.size(-1) ** -0.5 if scale is None else scale
            row = packed_attention(query, key, value, self.parts, scale, causal=False)
        return row if self.back is None else row[self.back]

    def _by_length(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
    ) -> torch.Tensor:
        sizes = [count * length for count, length in self.shapes]
        outputs: list[torch.Tensor] = []
        parts = zip(*(tensor.split(sizes) for tensor in (query, key, value)), strict=True)
        for (count, length), tensors in zip(self.shapes, parts, strict=True):
            split = [tensor.unflatten(0, (count, length)).transpose(1, 2) for tensor in tensors]
            output = F.scaled_dot_product_attention(split[0], split[1], split[2], scale=scale)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


@dataclass
class SegmentedRow(PackedSeqParams):
    """The segments of one row for every layer. Its format stays `sbhd`: rotation by position needs no boundaries."""

    frames: Segments | None = None
    """Patches of one frame; always there, the default serves the class it comes from."""
    windows: Segments | None = None
    """Patches of one window, None where every layer sees whole frames."""
    frame_layers: frozenset[int] = frozenset()
    """Layers, counted from 0, that see frames where there are windows."""

    def of_layer(self, number: int) -> Segments:
        """What the layer that megatron-core calls `number` (from 1) sees."""
        found = self.frames if self.windows is None or number - 1 in self.frame_layers else self.windows
        assert found is not None, "a row is made with its frames"
        return found


class SegmentAttention(MegatronModule):
    """Core attention of an encoder; a drop-in for `SelfAttention`'s. No dropout and no context parallelism."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str,
                 softmax_scale: float | None = None, pg_collection: Any = None,
                 packed_attention: Callable[..., torch.Tensor] | None = None, **_: Any) -> None:  # fmt: skip
        super().__init__(config=config)
        self.packed_attention = packed_attention
        assert attn_mask_type is AttnMaskType.no_mask, "segments attend in both directions"
        assert config.attention_dropout == 0, "an encoder has no dropout"
        assert pg_collection.cp.size() == 1, "an encoder spreads whole images over ranks"
        self.layer_number, self.scale = layer_number, softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
                packed_seq_params: PackedSeqParams | None = None, **_: Any) -> torch.Tensor:  # fmt: skip
        """`[T, 1, N, D]` each to `[T, 1, N * D]`."""
        assert attention_mask is None, "segments stand in for a mask"
        assert isinstance(packed_seq_params, SegmentedRow), "the row of an encoder comes as SegmentedRow"
        segments = packed_seq_params.of_layer(self.layer_number)
        row = segments.attend(query.squeeze(1), key.squeeze(1), value.squeeze(1), self.scale, self.packed_attention)
        return row.flatten(1).unsqueeze(1)
