"""Read a Hugging Face `config.json` completely: every key is used, fixed, ignored for a reason, or an error."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loongforge.core.errors import ConfigError
from loongforge.core.model.quantisation import fp8_block

QUANTIZATION = "quantization_config"

RUNTIME_KEYS = {
    "_attn_implementation": "how transformers computes attention",
    "_attn_implementation_autoset": "how transformers computes attention",
    "_name_or_path": "where the file came from",
    "chunk_size_feed_forward": "how transformers schedules the MLP; same result",
    "dtype": "type of the stored tensors; the tensors say it themselves",
    "id2label": "classification heads only",
    "is_encoder_decoder": "transformers' bookkeeping",
    "label2id": "classification heads only",
    "output_attentions": "what transformers returns",
    "output_hidden_states": "what transformers returns",
    "problem_type": "classification heads only",
    "return_dict": "what transformers returns",
    "torch_dtype": "type of the stored tensors; the tensors say it themselves",
    "transformers_version": "who wrote the file",
    "unsloth_fixed": "who wrote the file",
    "unsloth_version": "who wrote the file",
    "use_cache": "generation in transformers",
}
"""Keys of any family that say nothing about the model, each with the reason it is ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HFKeys:
    """What one family makes of every key of its `config.json`."""

    model_type: str
    architecture: str
    fields: Mapping[str, str]
    """Key to the name of our field."""
    required: tuple[str, ...]
    """Keys without which the model is unknown; transformers' class defaults are no released model."""
    only: Mapping[str, tuple[Any, str]]
    """Key to the one value understood and why there is no other. `quantization_config` need not be here: the checkpoint
    engine reads fp8 in blocks, and everything else is refused."""
    ignored: Mapping[str, str]
    """Key to the reason it is ignored, besides `RUNTIME_KEYS`."""
    special: tuple[str, ...] = ()
    """Keys that the family's own code reads."""
    also: tuple[str, ...] = ()
    """Other values of `model_type` with the same meaning of every key; `model_type` is what we write."""
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Another spelling of a key of `fields` to the spelling of the releases."""

    def read(self, hf: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Values by our field name, and every problem found."""
        hf = {self.aliases.get(key, key): value for key, value in hf.items()}
        said = {*self.fields, *self.only, *self.ignored, *self.special}
        known = said | {*RUNTIME_KEYS, "model_type", "architectures", QUANTIZATION}
        problems = [self._unknown(key, hf[key], known) for key in hf if key not in known]
        if hf.get("model_type", self.model_type) not in (self.model_type, *self.also):
            problems.append(f"config.json: model_type {hf['model_type']!r} is not {self.model_type!r}.")
        if self.architecture not in (hf.get("architectures") or [self.architecture]):
            problems.append(f"config.json: architectures {hf['architectures']!r} lacks {self.architecture!r}.")
        for key, (value, reason) in self.only.items():
            if key in hf and (hf[key] != value or isinstance(hf[key], bool) != isinstance(value, bool)):
                problems.append(f"config.json: {key}={hf[key]!r} is not supported, only {value!r}: {reason}.")
        if QUANTIZATION not in said:
            problems += _quantised(hf.get(QUANTIZATION))
        lacking = [key for key in self.required if hf.get(key) is None]
        problems += [f"config.json: {key!r} is missing; the size of the model depends on it." for key in lacking]
        return {name: hf[key] for key, name in self.fields.items() if hf.get(key) is not None}, problems

    def write(self, config: Any) -> dict[str, Any]:
        """The keys of `fields` that `config` has a value for, tuples as lists, and what names the architecture."""
        values = {key: getattr(config, name) for key, name in self.fields.items()}
        written = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        given = {key: value for key, value in written.items() if value is not None}
        return {"architectures": [self.architecture], "model_type": self.model_type, **given}

    def _unknown(self, key: str, value: Any, known: set[str]) -> str:
        near = difflib.get_close_matches(key, sorted(known), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return (
            f"config.json: unknown key {key!r} (value {value!r}) for {self.model_type}.{hint} "
            "Remove it if it does not change the model."
        )


def _quantised(quantization: Any) -> list[str]:
    try:
        fp8_block(quantization)
    except ConfigError as error:
        return [str(error)]
    return []
