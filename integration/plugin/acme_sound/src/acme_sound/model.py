"""The ear as a megatron-core module: the tower that LoongForge ships, over windows instead of squares."""

from acme_sound.config import AcmeEarConfig
from loongforge.core.model.contract import TowerContext
from loongforge.core.model.weights import Copy, WeightTable
from loongforge.models.vision.block_weights import (
    HF_LAYER,
    LAYER,
    attention_rules,
    column_rules,
    norm_rules,
    row_rules,
)
from loongforge.models.vision.tower import VisionTower


def build(config: AcmeEarConfig, context: TowerContext) -> VisionTower:
    """The ear on this rank."""
    return VisionTower(config.geometry(), (1, 1, config.window, 1), context)


def weights(config: AcmeEarConfig) -> WeightTable:
    """The two-way table."""
    names = ("patch_embed.proj.weight", "patch_embed.proj.bias")
    return WeightTable(
        rules=(
            *(Copy(megatron=name, hf=name) for name in names),
            *norm_rules(LAYER + "input_layernorm", HF_LAYER + "norm1", bias=True),
            *attention_rules(config.num_attention_heads, config.hidden_size // config.num_attention_heads),
            *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "norm2", bias=True),
            *column_rules(LAYER + "mlp.linear_fc1", HF_LAYER + "fc1"),
            *row_rules(LAYER + "mlp.linear_fc2", HF_LAYER + "fc2"),
        )
    )
