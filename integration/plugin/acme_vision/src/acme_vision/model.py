"""The encoder as a megatron-core module: the vision tower that LoongForge ships, with this family's geometry."""

from acme_vision.config import CHANNELS, AcmeVitConfig
from loongforge.core.model.contract import TowerContext
from loongforge.models.vision.tower import VisionTower


def build(config: AcmeVitConfig, context: TowerContext) -> VisionTower:
    """The encoder on this rank."""
    kernel = (CHANNELS, 1, config.patch_size, config.patch_size)  # one frame: Acme sees no videos
    return VisionTower(config.geometry(), kernel, context)
