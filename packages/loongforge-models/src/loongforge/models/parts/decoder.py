"""What the configs of all decoder-only language models share: fields, checks, and the way to `config.json` and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from loongforge.core.errors import ConfigError
from loongforge.core.model.geometry import TransformerGeometry
from loongforge.models.parts.checks import wrong_counts, wrong_numbers, wrong_switches
from loongforge.models.parts.hf_config import HFKeys
from loongforge.models.parts.rope import Rope

FIELDS: Mapping[str, str] = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "norm_epsilon",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
"""Keys of the fields of `Decoder`, for `HFKeys.fields` of a family."""

REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
"""Keys without which no decoder is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Fields of every decoder-only language model here, named as Megatron names them.

    A family derives from it, adds its fields, and says in `LABEL`, `KEYS`, `ROPE` and the methods that begin with
    `own_` what sets it apart. Raises `ConfigError` with every impossible value at once.
    """

    LABEL: ClassVar[str]
    """The family's name, for messages."""
    KEYS: ClassVar[HFKeys]
    """Every key that transformers or a released checkpoint writes."""
    ROPE: ClassVar[Mapping[str, tuple[str, ...]]] = {"default": ()}
    """Rotary scalings understood, and the parameters of each."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_hidden_size: int
    """Width of the MLP between its gate-and-up and down matrices."""
    num_attention_heads: int
    """Query heads."""
    vocab_size: int
    """Rows of the embedding before any padding for parallelism."""
    max_position_embeddings: int = 32768
    """Longest sequence the model was made for."""
    norm_epsilon: float = 1e-6
    """Term added to the mean square in every RMSNorm."""
    rotary_base: float = 10000.0
    """Base of the rotary position frequencies (theta)."""
    tie_word_embeddings: bool = False
    """The output matrix is the embedding matrix."""
    init_method_std: float = 0.02
    """Standard deviation of fresh weights."""
    attention_dropout: float = 0.0
    """Dropout of attention weights while training."""
    bos_token_id: int | None = None
    """Token that may open a text; not used in training, written to the export."""
    eos_token_id: int | tuple[int, ...] | None = None
    """Token or tokens that end a generated text; not used in training, written to the export."""
    pad_token_id: int | None = None
    """Token that fills a batch in generation; not used in training, written to the export."""

    def __post_init__(self) -> None:
        counts = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "vocab_size")
        problems = wrong_counts(self.LABEL, self, *counts, "max_position_embeddings")
        problems += wrong_numbers(self.LABEL, self, "norm_epsilon", "rotary_base", "init_method_std")
        problems += wrong_switches(self.LABEL, self, "tie_word_embeddings")
        if not isinstance(self.attention_dropout, int | float) or not 0 <= self.attention_dropout < 1:
            problems.append(f"{self.LABEL}: attention_dropout must be in [0, 1), got {self.attention_dropout!r}.")
        problems += self.own_problems()
        problems += [] if problems else self.own_contradictions()
        if problems:
            raise ConfigError(*problems)

    def own_problems(self) -> list[str]:
        """Impossible values of the family's own fields, one by one."""
        return []

    def own_contradictions(self) -> list[str]:
        """Values that do not go together; asked when each is possible alone."""
        return []

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The model that a `config.json` describes; `ConfigError` names every key that is unknown or unsupported."""
        values, problems = cls.KEYS.read(hf)
        rope, more = Rope.read(hf, cls.ROPE, cls.LABEL)
        problems += more + cls.own_layer_types(hf)
        if rope.base is not None:
            values["rotary_base"] = rope.base
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        own, more = cls.own_values(hf, rope)
        if problems + more:
            raise ConfigError(*problems, *more)
        return cls(**values, **own)

    @classmethod
    def own_values(cls, hf: Mapping[str, Any], rope: Rope) -> tuple[dict[str, Any], list[str]]:
        """Fields that are more than one key of `KEYS.fields`, and the problems found with special keys."""
        return {}, []

    @classmethod
    def own_layer_types(cls, hf: Mapping[str, Any]) -> list[str]:
        """What is wrong with the kinds of layers that a file names."""
        return wrong_layer_types(hf)

    def to_hf(self) -> dict[str, Any]:
        """`config.json` of this model, spelled as in the releases; transformers 4.51 and later read it."""
        always = {"hidden_act": "silu", "rope_theta": self.rotary_base, "use_cache": True}
        return dict(sorted({**self.KEYS.write(self), **always, **self.own_keys()}.items()))

    def own_keys(self) -> dict[str, Any]:
        """Keys of `config.json` besides those of `KEYS.fields` and the ones of every decoder."""
        return {"rope_scaling": None}

    def geometry(self) -> TransformerGeometry:
        """What the plan and the trainer need to know."""
        shared = {
            "num_layers": self.num_layers,
            "hidden_size": self.hidden_size,
            "ffn_hidden_size": self.ffn_hidden_size,
            "num_attention_heads": self.num_attention_heads,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "norm_epsilon": self.norm_epsilon,
            "rotary_base": self.rotary_base,
            "tie_word_embeddings": self.tie_word_embeddings,
            "init_method_std": self.init_method_std,
            "attention_dropout": self.attention_dropout,
        }
        return TransformerGeometry(**shared, **self.own_geometry())

    def own_geometry(self) -> dict[str, Any]:
        """Fields of `TransformerGeometry` besides those of every decoder."""
        raise NotImplementedError(f"{type(self).__name__} must say its attention")


def default_head(hf: Mapping[str, Any]) -> int:
    """`head_dim`, or the hidden size shared among the heads; 0 where the file lacks both, reported elsewhere."""
    heads = hf.get("num_attention_heads")
    return hf.get("head_dim") or (hf.get("hidden_size", 0) // heads if heads else 0)


def wrong_layer_types(hf: Mapping[str, Any]) -> list[str]:
    """`layer_types`, where a file has it, says that every layer attends to everything before it."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return []
    if set(kinds) - {"full_attention"}:
        others = sorted(set(kinds) - {"full_attention"})
        return [f"config.json: layer_types has {others!r}; only 'full_attention' is supported."]
    if len(kinds) != hf.get("num_hidden_layers"):
        return [f"config.json: layer_types has {len(kinds)} entries for {hf.get('num_hidden_layers')!r} layers."]
    return []
