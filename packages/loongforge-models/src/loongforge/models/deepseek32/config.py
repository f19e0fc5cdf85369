"""The geometry of a DeepSeek-V3.2 model, and its two-way translation to a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

from loongforge.core.model.geometry import IndexGeometry, SparseRoute
from loongforge.core.model.sparse_route import read_speeds
from loongforge.models.deepseek3.config import DeepSeek3Config
from loongforge.models.deepseek3.keys import HF_KEYS
from loongforge.models.parts.checks import wrong_choices, wrong_counts, wrong_rates, wrong_switches
from loongforge.models.parts.hf_config import HFKeys

SIZES = {
    "index_n_heads": "dsa_indexer_n_heads",
    "index_head_dim": "dsa_indexer_head_dim",
    "index_topk": "dsa_indexer_topk",
}
"""Keys of the indexer's sizes and our names of them."""
FP8_WIDTH = 128
"""Of the index heads that fp8 rotates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSeek32Config(DeepSeek3Config):
    """A DeepSeek-V3.2 model: the fields of DeepSeek-V3, and those of the indexer that chooses the keys of a query.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "deepseek32"
    KEYS: ClassVar[HFKeys] = replace(
        HF_KEYS,
        model_type="deepseek_v32",
        also=(),
        architecture="DeepseekV32ForCausalLM",
        fields={**HF_KEYS.fields, **SIZES},
        required=(*HF_KEYS.required, *SIZES, "q_lora_rank"),
        only={**HF_KEYS.only, "mlp_bias": (False, "no released DeepSeek-V3.2 has biases")},
        special=(*HF_KEYS.special, "layer_types", "mlp_layer_types"),
    )
    TRAINING: ClassVar[tuple[str, ...]] = (
        *DeepSeek3Config.TRAINING,
        "dsa_indexer_loss_coeff",
        "dsa_indexer_warmup",
        "dsa_indexer_fp8",
        "dsa_route",
        "dsa_speeds",
    )

    dsa_indexer_n_heads: int
    """Heads of the indexer."""
    dsa_indexer_head_dim: int
    """Width of an index head; its first qk_pos_emb_head_dim channels turn with the position."""
    dsa_indexer_topk: int
    """Keys that a query attends to."""
    dsa_indexer_loss_coeff: float = 0.0
    """Factor of the loss that teaches the indexer what attention looks at; 0 leaves the indexer as it is. Not part of
    `config.json`, nor are the fields below."""
    dsa_indexer_warmup: bool = False
    """Train the indexer alone, on what attention to every key gives each of them; the rest stays as loaded."""
    dsa_indexer_fp8: bool = False
    """Choose keys by scores of rotated and rounded heads, as the release does; what learns is not rounded."""
    dsa_route: SparseRoute = "auto"
    """`masked` computes attention for all keys under a mask, `gather` for the chosen rows of the latent alone."""
    dsa_speeds: str | None = None
    """File with what `dsa_route: auto` goes by, as `loongforge bench kernels --speeds` writes it."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        return [
            *DeepSeek3Config.own_problems(self),
            *wrong_counts(self.LABEL, self, *SIZES.values()),
            *wrong_rates(self.LABEL, self, "dsa_indexer_loss_coeff"),
            *wrong_switches(self.LABEL, self, "dsa_indexer_warmup", "dsa_indexer_fp8"),
            *wrong_choices(self.LABEL, self, "dsa_route", get_args(SparseRoute)),
        ]

    def own_contradictions(self) -> list[str]:
        """As in DeepSeek-V3; the indexer reads the latent of the queries, and its attention has no dropout."""
        problems = DeepSeek3Config.own_contradictions(self)
        if self.q_lora_rank is None:
            problems.append(f"{self.LABEL}: q_lora_rank must be a number, the indexer reads the latent of the queries.")
        if self.qk_pos_emb_head_dim > self.dsa_indexer_head_dim:
            problems.append(
                f"{self.LABEL}: dsa_indexer_head_dim={self.dsa_indexer_head_dim!r} must be at least "
                f"qk_pos_emb_head_dim={self.qk_pos_emb_head_dim!r}: so many of its channels turn."
            )
        if self.dsa_indexer_fp8 and self.dsa_indexer_head_dim != FP8_WIDTH:
            problems.append(
                f"{self.LABEL}: dsa_indexer_fp8=True rotates index heads of {FP8_WIDTH} channels, and "
                f"dsa_indexer_head_dim={self.dsa_indexer_head_dim!r}: leave it out."
            )
        if self.attention_dropout:
            problems.append(
                f"{self.LABEL}: attention_dropout={self.attention_dropout!r} must be 0: sparse attention has none."
            )
        return problems

    @classmethod
    def own_layer_types(cls, hf: Mapping[str, Any]) -> list[str]:
        """Where a file names the kinds of its layers, all attend sparsely, and experts follow the dense ones."""
        layers, dense = hf.get("num_hidden_layers"), hf.get("first_k_dense_replace")
        if not isinstance(layers, int) or not isinstance(dense, int):
            return []  # reported elsewhere
        expected = {
            "layer_types": ["indexed_attention"] * layers,
            "mlp_layer_types": ["dense"] * min(dense, layers) + ["sparse"] * (layers - dense),
        }
        return [
            f"config.json: {key}={hf[key]!r} is not supported, only {value!r}: it follows from the other sizes."
            for key, value in expected.items()
            if hf.get(key) is not None and hf[key] != value
        ]

    def own_geometry(self) -> dict[str, Any]:
        """As DeepSeek-V3, with an indexer."""
        shared = DeepSeek3Config.own_geometry(self)
        index = IndexGeometry(
            heads=self.dsa_indexer_n_heads,
            head_dim=self.dsa_indexer_head_dim,
            topk=self.dsa_indexer_topk,
            loss_coeff=self.dsa_indexer_loss_coeff,
            warmup=self.dsa_indexer_warmup,
            fp8=self.dsa_indexer_fp8,
            route=self.dsa_route,
            speeds=None if self.dsa_speeds is None else read_speeds(self.dsa_speeds),
        )
        return {**shared, "latent": replace(shared["latent"], index=index)}
