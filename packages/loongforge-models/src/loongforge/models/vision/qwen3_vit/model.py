"""Qwen3-VL's vision encoder as a megatron-core module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loongforge.models.vision.qwen3_vit.config import Qwen3VitConfig
from loongforge.models.vision.tower import VisionTower

if TYPE_CHECKING:
    from loongforge.core.model.contract import TowerContext


def build(config: Qwen3VitConfig, context: TowerContext) -> VisionTower:
    """The encoder on this rank; weights are fresh unless a checkpoint is about to fill them."""
    kernel = (config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    return VisionTower(config.geometry(), kernel, context)
