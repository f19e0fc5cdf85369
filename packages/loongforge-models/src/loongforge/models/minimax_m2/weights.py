"""Hugging Face tensors of MiniMax-M2 and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import Copy, FuseGateUp, LeftOut, WeightTable
from loongforge.models.minimax_m2.config import MiniMaxM2Config
from loongforge.models.parts.decoder_weights import HF_LAYER, MLP, grouped_attention, mlp_norm, table

HF_EXPERTS = HF_LAYER + "block_sparse_moe."
EXPERT, HF_EXPERT = MLP + "experts.local_experts.{expert}.", HF_EXPERTS + "experts.{expert}."


def weights(config: MiniMaxM2Config) -> WeightTable:
    """The two-way table; the bias of the experts' choice, a buffer on both sides, stands beside the router there."""
    geometry = config.geometry()
    return table(
        geometry,
        *grouped_attention(geometry),
        *mlp_norm(),
        Copy(megatron=MLP + "router.weight", hf=HF_EXPERTS + "gate.weight"),
        Copy(megatron=MLP + "router.expert_bias", hf=HF_EXPERTS + "e_score_correction_bias"),
        FuseGateUp(megatron=EXPERT + "linear_fc1.weight", gate=HF_EXPERT + "w1.weight", up=HF_EXPERT + "w3.weight"),
        Copy(megatron=EXPERT + "linear_fc2.weight", hf=HF_EXPERT + "w2.weight", shard_dim=1),
        left_out=(
            LeftOut(
                hf=_further_layers(config), what="multi-token prediction", remedy="no release says how it is stored"
            ),
        ),
    )


def _further_layers(config: MiniMaxM2Config) -> str:
    """Names of the three further layers that a release says it has, were they stored behind the decoder's."""
    return rf"model\.layers\.({'|'.join(str(config.num_layers + number) for number in range(3))})\..*"
