"""Hugging Face tensors of Qwen3-VL's vision encoder and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import Copy, WeightTable
from loongforge.models.vision.block_weights import (
    HF_LAYER,
    LAYER,
    attention_rules,
    column_rules,
    norm_rules,
    row_rules,
)
from loongforge.models.vision.qwen3_vit.config import Qwen3VitConfig


def weights(config: Qwen3VitConfig) -> WeightTable:
    """The two-way table, under the names that the tensors have inside the encoder."""
    heads = config.num_attention_heads
    return WeightTable(
        rules=(
            Copy(megatron="patch_embed.proj.weight", hf="patch_embed.proj.weight"),
            Copy(megatron="patch_embed.proj.bias", hf="patch_embed.proj.bias"),
            Copy(megatron="pos_embed.weight", hf="pos_embed.weight"),
            *norm_rules(LAYER + "input_layernorm", HF_LAYER + "norm1", bias=True),
            *attention_rules(heads, config.hidden_size // heads),
            *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "norm2", bias=True),
            *column_rules(LAYER + "mlp.linear_fc1", HF_LAYER + "mlp.linear_fc1"),
            *row_rules(LAYER + "mlp.linear_fc2", HF_LAYER + "mlp.linear_fc2"),
        )
    )
