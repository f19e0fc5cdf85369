"""Tensors of the first Qwen as they were released, and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import Copy, FuseGateUp, SplitQKV, WeightTable
from loongforge.models.parts.decoder_weights import ATTENTION, MLP, input_norm, mlp_norm, table
from loongforge.models.qwen.config import QwenConfig

HF_LAYER = "transformer.h.{layer}."


def weights(config: QwenConfig) -> WeightTable:
    """The two-way table; `w2` is the gate, whose SiLU multiplies `w1`."""
    heads, width = config.num_attention_heads, config.kv_channels
    gate, up = HF_LAYER + "mlp.w2.weight", HF_LAYER + "mlp.w1.weight"
    return table(
        config.geometry(),
        *input_norm(HF_LAYER + "ln_1.weight"),
        *(
            SplitQKV(
                megatron=f"{ATTENTION}linear_qkv.{kind}",
                hf=f"{HF_LAYER}attn.c_attn.{kind}",
                num_attention_heads=heads,
                kv_channels=width,
            )
            for kind in ("weight", "bias")
        ),
        Copy(megatron=ATTENTION + "linear_proj.weight", hf=HF_LAYER + "attn.c_proj.weight", shard_dim=1),
        *mlp_norm(HF_LAYER + "ln_2.weight"),
        FuseGateUp(megatron=MLP + "linear_fc1.weight", gate=gate, up=up),
        Copy(megatron=MLP + "linear_fc2.weight", hf=HF_LAYER + "mlp.c_proj.weight", shard_dim=1),
        # Early exports stored the rotary table, which the config gives.
        ignored=(r"transformer\.(h\.\d+\.attn\.)?rotary_emb\.inv_freq",),
        embedding="transformer.wte.weight",
        norm="transformer.ln_f.weight",
    )
