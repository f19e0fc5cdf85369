"""Hugging Face tensors of InternLM2.5 and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import Copy, FuseGateUp, WeightTable
from loongforge.models.internlm2.config import InternLM2Config
from loongforge.models.parts.decoder_weights import ATTENTION, HF_LAYER, MLP, input_norm, mlp_norm, table

HF_ATTENTION, HF_MLP = HF_LAYER + "attention.", HF_LAYER + "feed_forward."


def weights(config: InternLM2Config) -> WeightTable:
    """The two-way table; `wqkv` holds the rows of each key/value group together, as megatron-core does."""
    gate, up = HF_MLP + "w1.weight", HF_MLP + "w3.weight"
    return table(
        config.geometry(),
        *input_norm(HF_LAYER + "attention_norm.weight"),
        Copy(megatron=ATTENTION + "linear_qkv.weight", hf=HF_ATTENTION + "wqkv.weight", shard_dim=0),
        Copy(megatron=ATTENTION + "linear_proj.weight", hf=HF_ATTENTION + "wo.weight", shard_dim=1),
        *mlp_norm(HF_LAYER + "ffn_norm.weight"),
        FuseGateUp(megatron=MLP + "linear_fc1.weight", gate=gate, up=up),
        Copy(megatron=MLP + "linear_fc2.weight", hf=HF_MLP + "w2.weight", shard_dim=1),
        embedding="model.tok_embeddings.weight",
        head="output.weight",
    )
