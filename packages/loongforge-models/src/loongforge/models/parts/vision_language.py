"""The `config.json` of a whole that sees: a text section, a vision section, and keys about both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loongforge.core.errors import ConfigError
from loongforge.models.parts.hf_config import HFKeys

if TYPE_CHECKING:
    from loongforge.core.config.run import ModelConfig

SECTIONS = ("text_config", "vision_config")

PLACES: dict[str, str] = dict.fromkeys(
    (
        *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
        *("vision_token_id", "image_token_index", "video_token_index"),
    ),
    "the tokenizer says which tokens stand for images and videos; transformers' default is the released one",
)
"""Keys about placeholder tokens, each with the reason it is ignored."""

Prefixes = dict[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What one architecture makes of the outermost keys of its `config.json`."""

    model_type: str
    architecture: str

    def read(self, hf: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """Text section, vision section and every problem; `tie_word_embeddings` of the whole stands in the text."""
        keys = HFKeys(
            model_type=self.model_type,
            architecture=self.architecture,
            fields={},
            required=SECTIONS,
            only={},
            ignored=PLACES,
            special=(*SECTIONS, "tie_word_embeddings"),
        )
        _, problems = keys.read(hf)
        wrong = [key for key in SECTIONS if hf.get(key) is not None and not isinstance(hf[key], Mapping)]
        problems += [f"config.json: {key} must be an object, got {hf[key]!r}." for key in wrong]
        text, vision = ({} if key in wrong else dict(hf.get(key) or {}) for key in SECTIONS)
        if "tie_word_embeddings" in hf:
            text["tie_word_embeddings"] = hf["tie_word_embeddings"]
        return text, vision, problems


def without_origin(section: Mapping[str, Any], model_types: tuple[str, ...], where: str) -> dict[str, Any]:
    """A section without what names its class, and without placeholder tokens, which some versions put there too.

    `ConfigError` when the section is another's.
    """
    kind = section.get("model_type", model_types[0])
    if kind not in model_types:
        raise ConfigError(f"config.json: {where}.model_type {kind!r} is none of {', '.join(model_types)}.")
    return {key: value for key, value in section.items() if key not in ("model_type", "architectures", *PLACES)}


def written_text(foundation: Mapping[str, Any], model_type: str, *left_out: str) -> dict[str, Any]:
    """A foundation's own `config.json` as the text section of a whole."""
    left = {"architectures", "use_cache", *left_out}
    return {**{key: value for key, value in foundation.items() if key not in left}, "model_type": model_type}


def written_vision(model: ModelConfig, model_type: str) -> dict[str, Any]:
    """The encoder, and the width that the projector gives, as the vision section of a whole."""
    return {
        **model.components["image_encoder"].geometry.to_hf(),
        "model_type": model_type,
        "out_hidden_size": model.foundation.geometry.hidden_size,
    }


def families(model: ModelConfig) -> dict[str, str]:
    """The family of every component by slot, without its owner."""
    return {slot: component.family.rpartition(":")[2] for slot, component in model.components.items()}
