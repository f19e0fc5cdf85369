"""Hugging Face tensors of the Qwen projector and the megatron-core parameters they become."""

from __future__ import annotations

from loongforge.core.model.weights import Rule, WeightTable
from loongforge.models.vision.block_weights import column_rules, norm_rules, row_rules
from loongforge.models.vision.qwen_mlp_adapter.config import QwenMlpAdapterConfig


def weights(config: QwenMlpAdapterConfig) -> WeightTable:
    """The two-way table, under the names that the tensors have inside the encoder of the release.

    Deepstack rules find tensors where the encoder has such levels.
    """
    rms = config.normalization == "RMSNorm"
    return WeightTable(
        rules=tuple(
            rule
            for megatron, hf in (("merger", "merger"), ("deepstack_mergers.{level}", "deepstack_merger_list.{level}"))
            for rule in _merger(f"{megatron}.", f"{hf}.", rms)
        )
    )


def _merger(megatron: str, hf: str, rms: bool) -> tuple[Rule, ...]:
    norm, first, second = ("ln_q", "mlp.0", "mlp.2") if rms else ("norm", "linear_fc1", "linear_fc2")
    return (
        *norm_rules(megatron + "norm", hf + norm, bias=not rms),
        *column_rules(megatron + "mlp.linear_fc1", hf + first),
        *row_rules(megatron + "mlp.linear_fc2", hf + second),
    )
