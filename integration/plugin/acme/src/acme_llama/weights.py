"""Hugging Face tensors of LLaMA and the megatron-core parameters they become."""

from acme_llama.config import LlamaConfig
from loongforge.core.model.weights import Copy, FuseGateUp, FuseQKV, WeightTable

OURS, THEIRS = "decoder.layers.{layer}.", "model.layers.{layer}."
ATTENTION, MLP = OURS + "self_attention.", OURS + "mlp."


def weights(config: LlamaConfig) -> WeightTable:
    """The two-way table."""
    embedding = "model.embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    before_attention, before_mlp = THEIRS + "input_layernorm.weight", THEIRS + "post_attention_layernorm.weight"
    qkv = FuseQKV(
        megatron=ATTENTION + "linear_qkv.weight",
        **{name: f"{THEIRS}self_attn.{name}_proj.weight" for name in "qkv"},
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
    )
    gate, up = (f"{THEIRS}mlp.{name}_proj.weight" for name in ("gate", "up"))
    return WeightTable(
        rules=(
            Copy(megatron="embedding.word_embeddings.weight", hf=embedding, shard_dim=0, vocab=True),
            Copy(megatron=OURS + "input_layernorm.weight", hf=before_attention),
            qkv,
            Copy(megatron=ATTENTION + "linear_proj.weight", hf=THEIRS + "self_attn.o_proj.weight", shard_dim=1),
            Copy(megatron=OURS + "pre_mlp_layernorm.weight", hf=before_mlp),
            FuseGateUp(megatron=MLP + "linear_fc1.weight", gate=gate, up=up),
            Copy(megatron=MLP + "linear_fc2.weight", hf=THEIRS + "mlp.down_proj.weight", shard_dim=1),
            Copy(megatron="decoder.final_layernorm.weight", hf="model.norm.weight"),
            Copy(megatron="output_layer.weight", hf=head, shard_dim=0, vocab=True),
            # TransformerEngine keeps the norms inside the matrices that follow them.
            Copy(megatron=ATTENTION + "linear_qkv.layer_norm_weight", hf=before_attention),
            Copy(megatron=MLP + "linear_fc1.layer_norm_weight", hf=before_mlp),
        ),
        ignored_hf=(r"lm_head\.weight",) if config.tie_word_embeddings else (),
    )
