"""The vision encoder of the Qwen families on megatron-core's transformer block; every option is in its geometry.

Shapes: P patches of all items, H hidden size, D width of one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock

from loongforge.core.megatron.encoder_config import encoder_block, encoder_config
from loongforge.core.megatron.segment_attention import SegmentedRow, Segments
from loongforge.core.platform.sending import sent
from loongforge.models.vision.initial_weights import initialise
from loongforge.models.vision.patch_grid import PatchGrid

if TYPE_CHECKING:
    from loongforge.core.model.contract import TowerContext
    from loongforge.core.model.geometry import EncoderGeometry


class PatchEmbedding(torch.nn.Module):
    """A convolution whose kernel is one patch, as the matrix product that it is; the weight has the kernel's shape."""

    def __init__(self, kernel: tuple[int, int, int, int], hidden_size: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        device = torch.cuda.current_device()
        self.proj = torch.nn.Module()
        self.proj.weight = torch.nn.Parameter(torch.empty(hidden_size, *kernel, dtype=dtype, device=device))
        offset = torch.nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=device)) if bias else None
        self.proj.register_parameter("bias", offset)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """`[P, channels x frames x height x width]` to `[P, H]` of the weight's type."""
        weight: torch.Tensor = self.proj.weight  # pyright: ignore[reportAssignmentType]
        bias: torch.Tensor | None = self.proj.bias  # pyright: ignore[reportAssignmentType]
        return F.linear(pixels.to(weight.dtype), weight.flatten(1), bias)


class VisionTower(MegatronModule):
    """Patch embedding, positions, transformer layers; an `Encoder` of `core.model.contract`."""

    def __init__(self, geometry: EncoderGeometry, kernel: tuple[int, int, int, int], context: TowerContext) -> None:
        config = encoder_config(geometry, context)
        super().__init__(config=config)
        self.geometry, self.tp_group = geometry, context.groups.tp
        dtype = config.params_dtype
        self.patch_embed = PatchEmbedding(kernel, geometry.hidden_size, geometry.patch_bias, dtype)
        if geometry.position_embeddings is not None:
            shape = (geometry.position_embeddings, geometry.hidden_size)
            self.pos_embed = torch.nn.Module()
            self.pos_embed.weight = torch.nn.Parameter(
                torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
            )
        self.decoder = TransformerBlock(
            config=config, spec=encoder_block(config, context.layers), post_layer_norm=False,
            pg_collection=context.groups,
        )  # fmt: skip
        if context.initialise:
            seed = context.run.train.seed
            initialise(self, std=geometry.init_method_std, seed=seed, tp=context.groups.tp)

    def forward(self, pixels: torch.Tensor, grid: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Patches `[P, patch_dim]` and each item's (t, h, w) to hidden states `[P, H]`, last and deepstack layers'.

        Without an item every parameter still gets a gradient, of zeros: other ranks wait for it.
        """
        if not grid:
            side = self.geometry.spatial_merge_size
            blank = pixels.new_zeros(side**2, self.geometry.patch_dim)
            return [hidden[:0] for hidden in self(blank, [(1, side, side)])]
        assert pixels.size(0) == sum(t * h * w for t, h, w in grid), f"{pixels.size(0)} patches are not those of {grid}"
        geometry, device = self.geometry, pixels.device
        places = PatchGrid.of(grid, geometry.spatial_merge_size)
        hidden = self.patch_embed(pixels)
        if geometry.position_embeddings is not None:
            table: torch.Tensor = self.pos_embed.weight  # pyright: ignore[reportAssignmentType]
            hidden = hidden + places.interpolate(table).to(hidden.dtype)
        channels = geometry.hidden_size // geometry.num_attention_heads
        angles = places.angles(channels, geometry.rotary_base, device)
        row, order, back = self._row(places, device)
        if order is not None:
            hidden, angles = hidden[order], angles[order]
        outputs = self._layers(hidden.unsqueeze(1), angles, row)
        return [output.squeeze(1) if back is None else output.squeeze(1)[back] for output in outputs]

    def _row(
        self, places: PatchGrid, device: torch.device
    ) -> tuple[SegmentedRow, torch.Tensor | None, torch.Tensor | None]:
        """What sees what, and the order of patches that suits most layers, with its inverse."""
        if self.geometry.window_patches is None:
            return SegmentedRow(qkv_format="sbhd", frames=Segments.of(places.frames, device)), None, None
        windows = Segments.of(places.windows(self.geometry.window_patches), torch.device("cpu"))
        order, back, frames = windows.order, windows.back, places.frames
        if order is not None and back is not None:
            order, back, frames = sent(order, device), sent(back, device), frames[order]
        row = SegmentedRow(
            qkv_format="sbhd", frames=Segments.of(frames, device), windows=windows.arranged(),
            frame_layers=frozenset(self.geometry.full_attention_layers),
        )  # fmt: skip
        return row, order, back

    def _layers(self, hidden: torch.Tensor, angles: torch.Tensor, row: SegmentedRow) -> list[torch.Tensor]:
        if self._recomputes_from(hidden):
            hidden.requires_grad_()
        taps = set(self.geometry.deepstack_layers)
        output = self.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=row,
            extract_layer_indices=taps,
        )  # fmt: skip
        return [output[0], *output[1]] if taps else [output]

    def _recomputes_from(self, hidden: torch.Tensor) -> bool:
        """Whether recomputed layers that train would get an input without gradient, and so silently not train."""
        frozen = torch.is_grad_enabled() and not hidden.requires_grad
        trains = any(parameter.requires_grad for parameter in self.decoder.parameters())
        return frozen and trains and self.config.recompute_granularity == "full"
