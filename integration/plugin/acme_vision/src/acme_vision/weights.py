"""Hugging Face tensors of the encoder and the megatron-core parameters they become."""

from acme_vision.config import AcmeVitConfig
from loongforge.core.model.weights import Copy, Rule, SplitQKV, WeightTable

OURS, THEIRS = "decoder.layers.{layer}.", "layers.{layer}."


def weights(config: AcmeVitConfig) -> WeightTable:
    """The two-way table."""
    heads = config.num_attention_heads
    ends = ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed.weight")
    rules: list[Rule] = [Copy(megatron=name, hf=name) for name in ends]
    for kind in ("weight", "bias"):
        rules.append(
            SplitQKV(
                megatron=f"{OURS}self_attention.linear_qkv.{kind}",
                hf=f"{THEIRS}qkv.{kind}",
                num_attention_heads=heads,
                kv_channels=config.hidden_size // heads,
            )
        )
        # Tensor parallel ranks share the outputs of `up`, bias included, and the inputs of the two that follow a split.
        split = 1 if kind == "weight" else None
        rules += [
            Copy(megatron=f"{OURS}self_attention.linear_proj.{kind}", hf=f"{THEIRS}out.{kind}", shard_dim=split),
            Copy(megatron=f"{OURS}mlp.linear_fc1.{kind}", hf=f"{THEIRS}up.{kind}", shard_dim=0),
            Copy(megatron=f"{OURS}mlp.linear_fc2.{kind}", hf=f"{THEIRS}down.{kind}", shard_dim=split),
            Copy(megatron=f"{OURS}input_layernorm.{kind}", hf=f"{THEIRS}norm1.{kind}"),
            Copy(megatron=f"{OURS}pre_mlp_layernorm.{kind}", hf=f"{THEIRS}norm2.{kind}"),
        ]
    return WeightTable(rules=tuple(rules))
