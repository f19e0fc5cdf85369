"""Qwen3-VL as a whole: `config.json` and tensor names, in both directions.

The dense and the mixture-of-experts models are two architectures in transformers; here the foundation's family tells
them apart, so either composition writes what its foundation is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from loongforge.core.errors import ConfigError
from loongforge.models.parts.vision_language import (
    Prefixes,
    Whole,
    families,
    without_origin,
    written_text,
    written_vision,
)
from loongforge.models.qwen3.config import Qwen3Config
from loongforge.models.qwen3_moe.config import Qwen3MoeConfig
from loongforge.models.vision.qwen3_vit.config import Qwen3VitConfig
from loongforge.models.vision.qwen_mlp_adapter.config import QwenMlpAdapterConfig

if TYPE_CHECKING:
    from loongforge.core.config.run import ModelConfig

SECTION = (24, 20, 20)
"""Rotated pairs for time, height and width where a file is silent, as in transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One of the two."""

    whole: Whole
    foundation: str
    config: type[Qwen3Config] | type[Qwen3MoeConfig]
    left_out: tuple[str, ...]
    """Keys of the foundation's own file that the text section has no use for."""

    @property
    def text_type(self) -> str:
        """`model_type` of the text section."""
        return f"{self.whole.model_type}_text"


WINDOWS = ("max_window_layers", "sliding_window", "use_sliding_window")
DENSE = Architecture(
    whole=Whole(model_type="qwen3_vl", architecture="Qwen3VLForConditionalGeneration"),
    foundation="qwen3",
    config=Qwen3Config,
    left_out=WINDOWS,
)
WITH_EXPERTS = Architecture(
    whole=Whole(model_type="qwen3_vl_moe", architecture="Qwen3VLMoeForConditionalGeneration"),
    foundation="qwen3_moe",
    config=Qwen3MoeConfig,
    left_out=(*WINDOWS, "output_router_logits"),
)


def components(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section that a `config.json` describes; `ConfigError` names every key unknown or unsupported."""
    architecture = WITH_EXPERTS if hf.get("model_type") == WITH_EXPERTS.whole.model_type else DENSE
    text, vision, problems = architecture.whole.read(hf)
    if problems:
        raise ConfigError(*problems)
    text["tie_word_embeddings"] = hf.get("tie_word_embeddings", False)  # transformers does not ask the text section
    given = _text(without_origin(text, (architecture.text_type, architecture.whole.model_type), "text_config"))
    foundation: dict[str, Any] = asdict(architecture.config.from_hf(given))
    if architecture is WITH_EXPERTS:
        # transformers 5 stacks the experts as megatron-core has them, the released files the other way round; only the
        # first spells the positions `rope_parameters`.
        foundation["expert_layout"] = "stacked" if text.get("rope_parameters") else "stacked_transposed"
    return {
        "image_encoder": {"family": "qwen3_vit", **asdict(Qwen3VitConfig.from_hf(vision))},
        "image_projector": {"family": "qwen_mlp_adapter", **asdict(QwenMlpAdapterConfig.from_hf(vision))},
        "foundation": {"family": architecture.foundation, **foundation},
    }


def to_hf(model: ModelConfig) -> dict[str, Any] | None:
    """`config.json` of the whole, spelled as in the releases; None when the components are not those of Qwen3-VL."""
    architecture = _architecture(model)
    if architecture is None:
        return None
    foundation: Any = model.foundation.geometry
    kind = architecture.whole.model_type
    text = written_text(foundation.to_hf(), architecture.text_type, *architecture.left_out)
    if getattr(foundation, "expert_layout", None) == "stacked":
        text = _newer_positions(text)
    return {
        "architectures": [architecture.whole.architecture],
        "model_type": kind,
        "text_config": text,
        "tie_word_embeddings": foundation.tie_word_embeddings,
        "vision_config": written_vision(model, kind),
    }


def prefixes(model: ModelConfig) -> Prefixes:
    """How the tensors are called in the whole; the released files and transformers 5 agree."""
    return {
        "image_encoder": (("", "model.visual."),),
        "image_projector": (("", "model.visual."),),
        "foundation": (("model.", "model.language_model."), ("lm_head.", "lm_head.")),
    }


def _text(text: dict[str, Any]) -> dict[str, Any]:
    """The text section as a language model's file: what transformers takes for granted is said."""
    section = "rope_parameters" if text.get("rope_parameters") is not None else "rope_scaling"
    rope: dict[str, Any] = {"mrope_section": list(SECTION), "mrope_interleaved": True, **(text.get(section) or {})}
    if rope["mrope_interleaved"] is not True:
        raise ConfigError(
            f"config.json: text_config.{section}.mrope_interleaved={rope['mrope_interleaved']!r} is not supported, "
            "only True: the sections of Qwen3-VL take turns."
        )
    if text.get("rope_theta") is None and rope.get("rope_theta") is None:
        raise ConfigError(
            "config.json: text_config.rope_theta is missing; transformers versions differ in its default."
        )
    if text.get("norm_topk_prob", True) is not True:
        raise ConfigError("config.json: text_config.norm_topk_prob must be true: Qwen3-VL always normalises.")
    more = {"norm_topk_prob": True} if "num_experts_per_tok" in text else {}
    return {"max_position_embeddings": 128000, **text, **more, section: rope}


def _newer_positions(text: dict[str, Any]) -> dict[str, Any]:
    """The spelling of transformers 5, which goes with its layout of the experts."""
    rope = {**text["rope_scaling"], "rope_theta": text["rope_theta"]}
    return {**{key: text[key] for key in text if key not in ("rope_scaling", "rope_theta")}, "rope_parameters": rope}


def _architecture(model: ModelConfig) -> Architecture | None:
    """Which of the two these components are, or neither."""
    named = families(model)
    if (named.get("image_encoder"), named.get("image_projector")) != ("qwen3_vit", "qwen_mlp_adapter"):
        return None
    projector: Any = model.components["image_projector"].geometry
    foundation: Any = model.foundation.geometry
    sees = getattr(foundation, "mrope_section", None) is not None and getattr(foundation, "mrope_interleaved", False)
    if projector.normalization != "LayerNorm" or not projector.deepstack_norm_after_merge or not sees:
        return None
    if named["foundation"] == "qwen3":
        return DENSE
    if named["foundation"] != "qwen3_moe" or foundation.moe_router_pre_softmax:
        return None
    return None if foundation.expert_layout == "per_expert" else WITH_EXPERTS
