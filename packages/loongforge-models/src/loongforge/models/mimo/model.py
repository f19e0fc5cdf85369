"""MiMo as a megatron-core module: the shared language model and nothing beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loongforge.core.megatron.language_model import build_language_model
from loongforge.models.mimo.config import MiMoConfig

if TYPE_CHECKING:
    from torch import nn

    from loongforge.core.model.contract import BuildContext


def build(config: MiMoConfig, context: BuildContext) -> nn.Module:
    """One pipeline chunk of the model; weights are freshly initialised."""
    return build_language_model(config.geometry(), context)
