"""Rules of the weight tables that all decoder-only language models share.

Left the megatron-core names, right those of Hugging Face. transformer_engine's names of norms that it fuses into a
matrix are rules too.
"""

from __future__ import annotations

import re
from typing import Literal

from loongforge.core.model.geometry import TransformerGeometry
from loongforge.core.model.weights import Copy, FuseGateUp, FuseQKV, LeftOut, Rule, StackedExperts, WeightTable

LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."
ATTENTION, HF_ATTENTION = LAYER + "self_attention.", HF_LAYER + "self_attn."
MLP, HF_MLP = LAYER + "mlp.", HF_LAYER + "mlp."

INDEX_MATRICES = ("wq_b", "wk", "weights_proj")
"""Of an indexer: queries, keys, and the weights of its heads."""

ExpertLayout = Literal["per_expert", "stacked", "stacked_transposed"]
"""How a checkpoint holds experts: three tensors for each; all of a layer in two tensors, `gate_up_proj` [E, 2I, H] and
`down_proj` [E, H, I]; or those with their last two dimensions exchanged."""


def table(
    geometry: TransformerGeometry,
    *layer: Rule,
    ignored: tuple[str, ...] = (),
    embedding: str = "model.embed_tokens.weight",
    norm: str = "model.norm.weight",
    head: str = "lm_head.weight",
    left_out: tuple[LeftOut, ...] = (),
    embedding_again: tuple[str, ...] = (),
    head_again: tuple[str, ...] = (),
) -> WeightTable:
    """The whole table from the rules of one layer: embedding, last norm, output matrix, tied or not, besides.

    Tensors of `embedding_again` and `head_again` are copies that a checkpoint has.
    """
    tied = geometry.tie_word_embeddings
    # Some exports of tied models store the head as well: the embedding again.
    again = (re.escape(head),) if tied else ()
    return WeightTable(
        rules=(
            Copy(
                megatron="embedding.word_embeddings.weight",
                hf=embedding,
                shard_dim=0,
                vocab=True,
                again=embedding_again,
            ),
            *layer,
            Copy(megatron="decoder.final_layernorm.weight", hf=norm),
            Copy(
                megatron="output_layer.weight",
                hf=embedding if tied else head,
                shard_dim=0,
                vocab=True,
                again=head_again,
            ),
        ),
        ignored_hf=(*again, *ignored),
        left_out_hf=left_out,
    )


def input_norm(hf: str = HF_LAYER + "input_layernorm.weight") -> tuple[Rule, ...]:
    """The norm before attention with query, key and value in one matrix."""
    return (
        Copy(megatron=LAYER + "input_layernorm.weight", hf=hf),
        Copy(megatron=ATTENTION + "linear_qkv.layer_norm_weight", hf=hf),
    )


def grouped_attention(geometry: TransformerGeometry) -> tuple[Rule, ...]:
    """Input norm and grouped-query attention, with biases and head norms as the geometry says."""
    kinds = ("weight", "bias") if geometry.add_qkv_bias else ("weight",)
    return (
        *input_norm(),
        *(
            FuseQKV(
                megatron=f"{ATTENTION}linear_qkv.{kind}",
                q=f"{HF_ATTENTION}q_proj.{kind}",
                k=f"{HF_ATTENTION}k_proj.{kind}",
                v=f"{HF_ATTENTION}v_proj.{kind}",
                num_attention_heads=geometry.num_attention_heads,
                num_query_groups=geometry.num_query_groups,
                kv_channels=geometry.kv_channels,
                gated=geometry.attention_gate,
            )
            for kind in kinds
        ),
        *_head_norms(geometry),
        Copy(megatron=ATTENTION + "linear_proj.weight", hf=HF_ATTENTION + "o_proj.weight", shard_dim=1),
    )


def latent_attention(geometry: TransformerGeometry) -> tuple[Rule, ...]:
    """Input norm and multi-head latent attention, with its indexer if there is one; the down projections and the
    indexer are whole on every rank."""
    latent = geometry.latent
    assert latent is not None, "only called for latent attention"
    before = HF_LAYER + "input_layernorm.weight"
    down = Copy(megatron=ATTENTION + "linear_kv_down_proj.weight", hf=HF_ATTENTION + "kv_a_proj_with_mqa.weight")
    if latent.q_lora_rank is None:
        query: tuple[Rule, ...] = (
            Copy(megatron=ATTENTION + "linear_q_proj.weight", hf=HF_ATTENTION + "q_proj.weight", shard_dim=0),
        )
    else:
        query = (
            Copy(megatron=ATTENTION + "linear_q_down_proj.weight", hf=HF_ATTENTION + "q_a_proj.weight"),
            *_latent_norm("q"),
            Copy(megatron=ATTENTION + "linear_q_up_proj.weight", hf=HF_ATTENTION + "q_b_proj.weight", shard_dim=0),
        )
    return (
        Copy(megatron=LAYER + "input_layernorm.weight", hf=before),
        *query,
        down,
        *_latent_norm("kv"),
        Copy(megatron=ATTENTION + "linear_kv_up_proj.weight", hf=HF_ATTENTION + "kv_b_proj.weight", shard_dim=0),
        Copy(megatron=ATTENTION + "linear_proj.weight", hf=HF_ATTENTION + "o_proj.weight", shard_dim=1),
        *(() if latent.index is None else _indexer()),
    )


def mlp_norm(hf: str = HF_LAYER + "post_attention_layernorm.weight") -> tuple[Rule, ...]:
    """The norm before an MLP or its experts."""
    return (
        Copy(megatron=LAYER + "pre_mlp_layernorm.weight", hf=hf),
        Copy(megatron=MLP + "linear_fc1.layer_norm_weight", hf=hf),
    )


def gated_mlp(part: str = "") -> tuple[Rule, ...]:
    """A gated MLP: the layer's own, one expert of it (`experts.{expert}.`), or the shared one (`shared_experts.`)."""
    ours = MLP + part.replace("experts.{expert}.", "experts.local_experts.{expert}.")
    theirs = HF_MLP + part
    return (
        FuseGateUp(megatron=ours + "linear_fc1.weight", gate=theirs + "gate_proj.weight", up=theirs + "up_proj.weight"),
        Copy(megatron=ours + "linear_fc2.weight", hf=theirs + "down_proj.weight", shard_dim=1),
    )


def gated_shared_expert() -> tuple[Rule, ...]:
    """The expert that every token passes, and the row whose sigmoid weighs it; spelled as in Qwen's models."""
    ours, theirs = MLP + "shared_experts.", HF_MLP + "shared_expert."
    return (
        FuseGateUp(megatron=ours + "linear_fc1.weight", gate=theirs + "gate_proj.weight", up=theirs + "up_proj.weight"),
        Copy(megatron=ours + "linear_fc2.weight", hf=theirs + "down_proj.weight", shard_dim=1),
        Copy(megatron=ours + "gate_weight", hf=HF_MLP + "shared_expert_gate.weight"),
    )


def experts(layout: ExpertLayout) -> tuple[Rule, ...]:
    """The experts of a layer, as the checkpoint holds them."""
    if layout == "per_expert":
        return gated_mlp("experts.{expert}.")
    ours, theirs = MLP + "experts.local_experts.{expert}.", HF_MLP + "experts."
    transposed = layout == "stacked_transposed"
    up, down = theirs + "gate_up_proj", theirs + "down_proj"
    return (
        StackedExperts(megatron=ours + "linear_fc1.weight", hf=up, transposed=transposed, gate_up=True, shard_dim=0),
        StackedExperts(megatron=ours + "linear_fc2.weight", hf=down, transposed=transposed, shard_dim=1),
    )


def router(*, bias: bool = False) -> tuple[Rule, ...]:
    """The router, whole on every rank; with `bias` the buffer that takes part in the choice."""
    weight = Copy(megatron=MLP + "router.weight", hf=HF_MLP + "gate.weight")
    correction = Copy(megatron=MLP + "router.expert_bias", hf=HF_MLP + "gate.e_score_correction_bias")
    return (weight, correction) if bias else (weight,)


def _head_norms(geometry: TransformerGeometry) -> tuple[Rule, ...]:
    if not geometry.qk_layernorm:
        return ()
    return tuple(
        Copy(megatron=f"{ATTENTION}{one}_layernorm.weight", hf=f"{HF_ATTENTION}{one}_norm.weight") for one in "qk"
    )


def _latent_norm(side: str) -> tuple[Rule, ...]:
    hf = f"{HF_ATTENTION}{side}_a_layernorm.weight"
    return (
        Copy(megatron=f"{ATTENTION}{side}_layernorm.weight", hf=hf),
        Copy(megatron=f"{ATTENTION}linear_{side}_up_proj.layer_norm_weight", hf=hf),
    )


def _indexer() -> tuple[Rule, ...]:
    ours, theirs = ATTENTION + "core_attention.indexer.", HF_ATTENTION + "indexer."
    return (
        *(Copy(megatron=f"{ours}linear_{one}.weight", hf=f"{theirs}{one}.weight") for one in INDEX_MATRICES),
        *(Copy(megatron=f"{ours}k_norm.{kind}", hf=f"{theirs}k_norm.{kind}") for kind in ("weight", "bias")),
    )
