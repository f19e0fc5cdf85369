"""Rules of a gated delta rule in place of attention, as Qwen3-Next stores it. Its input norm is attention's."""

from __future__ import annotations

from loongforge.core.model.geometry import DeltaGeometry, TransformerGeometry
from loongforge.core.model.weights import Copy, FuseDelta, Rule, SplitDelta
from loongforge.models.parts.decoder_weights import ATTENTION, HF_LAYER

HF_DELTA = HF_LAYER + "linear_attn."


def delta_rule(geometry: TransformerGeometry) -> tuple[Rule, ...]:
    """Projections, convolution, decays, head norm and output projection."""
    delta = geometry.delta
    assert delta is not None, "only called for models with a gated delta rule"
    sizes = _sizes(delta)
    return (
        FuseDelta(
            megatron=ATTENTION + "in_proj.weight",
            qkvz=HF_DELTA + "in_proj_qkvz.weight",
            ba=HF_DELTA + "in_proj_ba.weight",
            **sizes,
        ),
        SplitDelta(megatron=ATTENTION + "conv1d.weight", hf=HF_DELTA + "conv1d.weight", **sizes),
        *(Copy(megatron=ATTENTION + name, hf=HF_DELTA + name, shard_dim=0) for name in ("A_log", "dt_bias")),
        Copy(megatron=ATTENTION + "out_norm.weight", hf=HF_DELTA + "norm.weight"),
        Copy(megatron=ATTENTION + "out_proj.weight", hf=HF_DELTA + "out_proj.weight", shard_dim=1),
    )


def _sizes(delta: DeltaGeometry) -> dict[str, int]:
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    return {name: getattr(delta, name) for name in names}
