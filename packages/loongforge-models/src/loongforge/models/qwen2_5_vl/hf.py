"""Qwen2.5-VL as a whole: `config.json` and tensor names, in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from loongforge.core.errors import ConfigError
from loongforge.models.parts.hf_config import RUNTIME_KEYS
from loongforge.models.parts.vision_language import (
    PLACES,
    Prefixes,
    Whole,
    families,
    without_origin,
    written_text,
    written_vision,
)
from loongforge.models.qwen2.config import Qwen2Config
from loongforge.models.vision.qwen2_5_vit.config import Qwen2_5VitConfig
from loongforge.models.vision.qwen_mlp_adapter.config import QwenMlpAdapterConfig

if TYPE_CHECKING:
    from loongforge.core.config.run import ModelConfig

WHOLE = Whole(model_type="qwen2_5_vl", architecture="Qwen2_5_VLForConditionalGeneration")
TEXT_TYPE = "qwen2_5_vl_text"

OUTER = frozenset(
    {
        *("architectures", "model_type", "text_config", "vision_config", "tie_word_embeddings", "quantization_config"),
        *RUNTIME_KEYS,
        *PLACES,
    }
)
"""Outermost keys of a file whose text section is a section; the released files have it flat among these."""


def components(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section that a `config.json` describes; `ConfigError` names every key unknown or unsupported."""
    text, vision, problems = WHOLE.read(_sectioned(hf))
    if problems:
        raise ConfigError(*problems)
    if not text.get("tie_word_embeddings"):  # transformers asks the text section too
        text["tie_word_embeddings"] = (hf.get("text_config") or {}).get("tie_word_embeddings", False)
    foundation = Qwen2Config.from_hf(_text(without_origin(text, (TEXT_TYPE, WHOLE.model_type), "text_config")))
    return {
        "image_encoder": {"family": "qwen2_5_vit", **asdict(Qwen2_5VitConfig.from_hf(vision))},
        "image_projector": {"family": "qwen_mlp_adapter", **asdict(QwenMlpAdapterConfig.from_hf(vision))},
        "foundation": {"family": "qwen2", **asdict(foundation)},
    }


def to_hf(model: ModelConfig) -> dict[str, Any] | None:
    """`config.json` of the whole with a text section; None when the components are not those of Qwen2.5-VL."""
    foundation: Any = model.foundation.geometry
    slots = {"image_encoder": "qwen2_5_vit", "image_projector": "qwen_mlp_adapter", "foundation": "qwen2"}
    if families(model) != slots or foundation.mrope_section is None:
        return None
    projector: Any = model.components["image_projector"].geometry
    if projector.normalization != "RMSNorm":
        return None
    return {
        "architectures": [WHOLE.architecture],
        "model_type": WHOLE.model_type,
        "text_config": written_text(foundation.to_hf(), TEXT_TYPE),
        "tie_word_embeddings": foundation.tie_word_embeddings,
        "vision_config": written_vision(model, WHOLE.model_type),
    }


def prefixes(model: ModelConfig) -> Prefixes:
    """How the tensors are called in the whole; the released files and transformers 5 agree."""
    return {
        "image_encoder": (("", "visual."),),
        "image_projector": (("", "visual."),),
        "foundation": (("model.", "model."), ("lm_head.", "lm_head.")),
    }


def _sectioned(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A file with a text section, whether it had one or, as the released ones, the same keys outermost.

    Where there is a section, text keys that stand outside as well are left over from a released file.
    """
    outer = {key: value for key, value in hf.items() if key in OUTER}
    flat = {key: value for key, value in hf.items() if key not in OUTER}
    if hf.get("text_config") is None:
        return {**outer, "text_config": flat}
    left_over = {*Qwen2Config.KEYS.fields, *Qwen2Config.KEYS.only, *Qwen2Config.KEYS.ignored}
    left_over |= {*Qwen2Config.KEYS.special}
    return {**outer, **{key: value for key, value in flat.items() if key not in left_over}}


def _text(text: dict[str, Any]) -> dict[str, Any]:
    """The text section as a language model's file: what transformers takes for granted is said."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    problems: list[str] = []
    if rope.get("mrope_section") is None:
        problems.append("config.json: the text section lacks rope_scaling.mrope_section; images need three positions.")
    if text.get("rope_theta") is None and rope.get("rope_theta") is None:
        problems.append("config.json: 'rope_theta' is missing in the text section.")
    if problems:
        raise ConfigError(*problems)
    text = {key: value for key, value in text.items() if key != "use_mrope"}  # true or absent, and always so
    return {"rms_norm_eps": 1e-5, **text}
