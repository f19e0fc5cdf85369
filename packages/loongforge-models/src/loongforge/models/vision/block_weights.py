"""Rules of the weight table that the vision encoders share."""

from __future__ import annotations

from loongforge.core.model.weights import Copy, Rule, SplitQKV

LAYER = "decoder.layers.{layer}."
HF_LAYER = "blocks.{layer}."


def attention_rules(num_attention_heads: int, kv_channels: int) -> tuple[Rule, ...]:
    """The fused query, key and value matrix, and the one behind attention, both with biases."""
    ours, theirs = LAYER + "self_attention.", HF_LAYER + "attn."
    fused = (
        SplitQKV(
            megatron=f"{ours}linear_qkv.{kind}",
            hf=f"{theirs}qkv.{kind}",
            num_attention_heads=num_attention_heads,
            kv_channels=kv_channels,
        )
        for kind in ("weight", "bias")
    )
    return (*fused, *row_rules(ours + "linear_proj", theirs + "proj"))


def column_rules(megatron: str, hf: str) -> tuple[Rule, ...]:
    """A matrix and bias whose outputs tensor parallel ranks share."""
    return (
        Copy(megatron=megatron + ".weight", hf=hf + ".weight", shard_dim=0),
        Copy(megatron=megatron + ".bias", hf=hf + ".bias", shard_dim=0),
    )


def row_rules(megatron: str, hf: str) -> tuple[Rule, ...]:
    """A matrix whose inputs tensor parallel ranks share; its bias is whole on each."""
    return (
        Copy(megatron=megatron + ".weight", hf=hf + ".weight", shard_dim=1),
        Copy(megatron=megatron + ".bias", hf=hf + ".bias"),
    )


def norm_rules(megatron: str, hf: str, *, bias: bool) -> tuple[Rule, ...]:
    """A LayerNorm, or without bias an RMSNorm."""
    weight = Copy(megatron=megatron + ".weight", hf=hf + ".weight")
    return (weight, Copy(megatron=megatron + ".bias", hf=hf + ".bias")) if bias else (weight,)
