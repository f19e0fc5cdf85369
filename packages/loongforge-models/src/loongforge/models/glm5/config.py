"""The geometry of a GLM-5 model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from loongforge.models.deepseek32.config import DeepSeek32Config
from loongforge.models.glm5.keys import HF_KEYS, OFFSET, own_pattern, schedule, types_of
from loongforge.models.parts.checks import wrong_counts
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm5Config(DeepSeek32Config):
    """A GLM-5 model: the fields of DeepSeek-V3.2, and which layers have an indexer.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "glm5"
    KEYS: ClassVar[HFKeys] = HF_KEYS

    dsa_indexer_topk_freq: int = 1
    """One layer in as many has an indexer, the others attend to the keys of the layer before them; 1 gives every layer
    its own."""
    dsa_indexer_skip_topk_offset: int = 1
    """Layers at the beginning that all have an indexer; from the last of them on it is every topk_freq-th."""
    dsa_indexer_pattern: str | None = None
    """Instead of the two: F for every layer with an indexer, S for every one without, as in FFFSSSF."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        problems = DeepSeek32Config.own_problems(self)
        problems += wrong_counts(self.LABEL, self, "dsa_indexer_topk_freq", "dsa_indexer_skip_topk_offset")
        pattern = self.dsa_indexer_pattern
        if pattern is not None and (not isinstance(pattern, str) or set(pattern) != set("FS") or pattern[0] != "F"):
            problems.append(
                f"{self.LABEL}: dsa_indexer_pattern={pattern!r} must be letters F and S beginning with F, for example "
                "'FFFSSSF'; leave it out where every layer has an indexer."
            )
        return problems

    def own_contradictions(self) -> list[str]:
        """As in DeepSeek-V3.2; a pattern has a letter for every layer, and stands alone."""
        problems, pattern = DeepSeek32Config.own_contradictions(self), self.dsa_indexer_pattern
        if pattern is None:
            return problems
        if len(pattern) != self.num_layers:
            problems.append(
                f"{self.LABEL}: dsa_indexer_pattern has {len(pattern)} letters for num_layers={self.num_layers!r}: "
                "give one for each layer."
            )
        if self.dsa_indexer_topk_freq != 1:
            problems.append(
                f"{self.LABEL}: dsa_indexer_pattern={pattern!r} and dsa_indexer_topk_freq="
                f"{self.dsa_indexer_topk_freq!r} both say which layers have an indexer: give one."
            )
        return problems

    @property
    def indexer_pattern(self) -> str:
        """F or S for every layer."""
        given = self.dsa_indexer_pattern
        return given or schedule(self.num_layers, self.dsa_indexer_topk_freq, self.dsa_indexer_skip_topk_offset)

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """As in DeepSeek-V3.2, and which layers share."""
        # transformers sets head_dim itself; releases say the width of the one part of a head or of the other.
        told = {key: value for key, value in hf.items() if key != "head_dim"}
        values, problems = DeepSeek32Config.own_values(told, rope)
        if "bos_token_id" not in hf:
            values["bos_token_id"] = 0  # transformers' default
        freq = hf.get("index_topk_freq") or 1
        offset = hf.get("index_skip_topk_offset", OFFSET if freq != 1 else 1)
        pattern, more = own_pattern(hf, freq, offset)
        if pattern is not None and "S" not in pattern:
            pattern, freq, offset = None, 1, 1  # every layer is named, and the numbers beside say nothing
        if pattern is None:
            values |= {"dsa_indexer_topk_freq": freq, "dsa_indexer_skip_topk_offset": offset}
        return {**values, "dsa_indexer_pattern": pattern}, problems + more

    def to_hf(self) -> dict[str, Any]:
        """As every decoder's, with the positions spelled as in the releases, which are of transformers 5."""
        written = DeepSeek32Config.to_hf(self)
        scaling = written.pop("rope_scaling") or {}
        kind, base = scaling.pop("type", "default"), written.pop("rope_theta")
        return dict(sorted({**written, "rope_parameters": {**scaling, "rope_theta": base, "rope_type": kind}}.items()))

    def own_keys(self) -> dict[str, Any]:
        """As in DeepSeek-V3.2, and which layers share."""
        keys = {**DeepSeek32Config.own_keys(self), "bos_token_id": self.bos_token_id}
        freq, offset = self.dsa_indexer_topk_freq, self.dsa_indexer_skip_topk_offset
        if self.dsa_indexer_pattern is None and (freq, offset) != (1, 1):
            keys |= {"index_topk_freq": freq, "index_skip_topk_offset": offset}
        return keys | ({"indexer_types": types_of(self.indexer_pattern)} if "S" in self.indexer_pattern else {})

    def own_geometry(self) -> dict[str, Any]:
        """As DeepSeek-V3.2, with neighbouring channels of the indexer turned, and layers that share."""
        given = DeepSeek32Config.own_geometry(self)
        shared = tuple(layer for layer, letter in enumerate(self.indexer_pattern) if letter == "S")
        index = replace(given["latent"].index, interleaved=True, shared_layers=shared)
        return {**given, "latent": replace(given["latent"], index=index)}
