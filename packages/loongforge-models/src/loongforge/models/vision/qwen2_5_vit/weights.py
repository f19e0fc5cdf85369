"""Hugging Face tensors of Qwen2.5-VL's vision encoder and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import Copy, FuseGateUp, WeightTable
from loongforge.models.vision.block_weights import HF_LAYER, LAYER, attention_rules, norm_rules, row_rules
from loongforge.models.vision.qwen2_5_vit.config import Qwen2_5VitConfig


def weights(config: Qwen2_5VitConfig) -> WeightTable:
    """The two-way table, under the names that the tensors have inside the encoder."""
    heads, mlp, hf_mlp = config.num_attention_heads, LAYER + "mlp.", HF_LAYER + "mlp."
    gate_up = (
        FuseGateUp(megatron=f"{mlp}linear_fc1.{kind}", gate=f"{hf_mlp}gate_proj.{kind}", up=f"{hf_mlp}up_proj.{kind}")
        for kind in ("weight", "bias")
    )
    return WeightTable(
        rules=(
            Copy(megatron="patch_embed.proj.weight", hf="patch_embed.proj.weight"),
            *norm_rules(LAYER + "input_layernorm", HF_LAYER + "norm1", bias=False),
            *attention_rules(heads, config.hidden_size // heads),
            *norm_rules(LAYER + "pre_mlp_layernorm", HF_LAYER + "norm2", bias=False),
            *gate_up,
            *row_rules(mlp + "linear_fc2", hf_mlp + "down_proj"),
        )
    )
