"""The geometry of a model of the first Qwen, and its two-way translation to the `config.json` of the release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.models.parts.checks import wrong_counts, wrong_head, wrong_switches
from loongforge.models.parts.decoder import FIELDS, REQUIRED, Decoder
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import Rope

RENAMED = ("intermediate_size", "rms_norm_eps", "attention_dropout")
"""Keys of every other decoder that this one spells otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QwenConfig(Decoder):
    """A model of the first Qwen: a key and value head for each query head, biases on query, key and value, SwiGLU.

    Field names are Megatron's. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str] = "qwen"
    KEYS: ClassVar[HFKeys] = HFKeys(
        model_type="qwen",
        architecture="QWenLMHeadModel",
        fields={
            **{key: name for key, name in FIELDS.items() if key not in RENAMED},
            "attn_dropout_prob": "attention_dropout",
            "layer_norm_epsilon": "norm_epsilon",
            "rotary_emb_base": "rotary_base",
            "seq_length": "stretched_beyond",
            "use_dynamic_ntk": "use_dynamic_ntk",
            "use_logn_attn": "use_logn_attn",
        },
        required=REQUIRED,
        only={
            "emb_dropout_prob": (0.0, "no released Qwen drops embeddings"),
            "no_bias": (True, "only query, key and value of a released Qwen have biases"),
            "rotary_pct": (1.0, "a released Qwen rotates the whole head"),
            "scale_attn_weights": (True, "a released Qwen divides scores by the root of a head's width"),
            "visual": (None, "it makes this a Qwen-VL, whose images nothing here reads"),
        },
        ignored={
            "auto_map": "code that comes with the weights; the architecture is known here",
            "bf16": "type of the stored tensors; the tensors say it themselves",
            "fp16": "type of the stored tensors; the tensors say it themselves",
            "fp32": "type of the stored tensors; the tensors say it themselves",
            "onnx_safe": "how the released code is exported to ONNX",
            "softmax_in_fp32": "how the released code rounds in half precision",
            "tokenizer_class": "tokenizer",
            "tokenizer_type": "tokenizer",
            "use_cache_kernel": "generation in the released code",
            "use_cache_quantization": "generation in the released code",
            "use_flash_attn": "how the released code computes attention",
        },
        special=("intermediate_size", "kv_channels"),
    )

    stretched_beyond: int = 8192
    """Tokens beyond which generation stretches positions and scales queries; not used in training, written to the
    export. The released code does neither while it trains, whatever the length."""
    use_dynamic_ntk: bool = False
    """Generation raises the rotary base for longer texts; not used in training, written to the export."""
    use_logn_attn: bool = False
    """Generation scales queries by the logarithm of the length; not used in training, written to the export."""

    def own_problems(self) -> list[str]:
        """Impossible values of the fields of this class, one by one."""
        return [
            *wrong_counts(self.LABEL, self, "stretched_beyond"),
            *wrong_switches(self.LABEL, self, "use_dynamic_ntk", "use_logn_attn"),
        ]

    def own_contradictions(self) -> list[str]:
        """Values that do not go together."""
        return wrong_head(self.LABEL, self)

    @property
    def kv_channels(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """Width of the MLP, of which the file counts gate and up together; the width of a head follows from others."""
        problems: list[str] = []
        both, heads, width = hf.get("intermediate_size") or 0, hf.get("num_attention_heads"), hf.get("kv_channels")
        if both % 2:
            problems.append(f"config.json: intermediate_size={both!r} must be even, it counts gate and up together.")
        if width is not None and heads and width * heads != hf.get("hidden_size"):
            problems.append(
                f"config.json: kv_channels={width!r} is not supported, only hidden_size / num_attention_heads = "
                f"{hf.get('hidden_size', 0) / heads:g}: the released code cuts query, key and value at hidden_size."
            )
        return {"ffn_hidden_size": both // 2}, problems

    def to_hf(self) -> dict[str, Any]:
        """`config.json` of this model, spelled as in the release; the code that comes with the weights reads it."""
        also = {
            "auto_map": {
                "AutoConfig": "configuration_qwen.QWenConfig",
                "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
            },
            "emb_dropout_prob": 0.0,
            "intermediate_size": 2 * self.ffn_hidden_size,
            "kv_channels": self.kv_channels,
            "no_bias": True,
            "rotary_pct": 1.0,
            "scale_attn_weights": True,
            "use_cache": True,
        }
        return dict(sorted({**self.KEYS.write(self), **also}.items()))

    def own_geometry(self) -> dict[str, Any]:
        """Attention with biases, no head shared."""
        return {"num_query_groups": self.num_attention_heads, "kv_channels": self.kv_channels, "add_qkv_bias": True}
