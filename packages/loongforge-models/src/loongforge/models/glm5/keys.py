"""What GLM-5 makes of every key of its `config.json`, and how a file says which layers have an indexer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loongforge.models.deepseek32.config import DeepSeek32Config

LETTERS = {"full": "F", "shared": "S"}
"""transformers' words for a layer with an indexer and one without, and their letters in a pattern."""

OFFSET = 2
"""transformers' `index_skip_topk_offset` where a file has a frequency alone."""

_BASE = DeepSeek32Config.KEYS
HF_KEYS = replace(
    _BASE,
    model_type="glm_moe_dsa",
    architecture="GlmMoeDsaForCausalLM",
    only={
        **_BASE.only,
        "attention_bias": (False, "no released GLM-5 has biases"),
        "hidden_act": ("silu", "the MLP of GLM-5 is SwiGLU"),
        "indexer_rope_interleave": (True, "the rotation of the indexer pairs neighbouring channels"),
        "mlp_bias": (False, "no released GLM-5 has biases"),
        "moe_router_dtype": ("float32", "routers compute in fp32"),
        "scoring_func": ("sigmoid", "GLM-5 routes by sigmoid"),
        "topk_method": ("noaux_tc", "GLM-5 chooses experts with a bias"),
    },
    ignored={
        **_BASE.ignored,
        "index_share_for_mtp_iteration": "how a further layer drafts several tokens in generation",
    },
    special=(
        *_BASE.special,
        *("index_topk_freq", "index_skip_topk_offset", "index_topk_pattern", "indexer_types"),
    ),
)
"""Every key that transformers or a released checkpoint writes."""


def schedule(layers: int, freq: int, offset: int) -> str:
    """F for the first `offset` layers and then for every `freq`-th, S for the others, as transformers counts them."""
    return "".join("S" if max(layer - offset + 1, 0) % freq else "F" for layer in range(layers))


def types_of(pattern: str) -> list[str]:
    """transformers' words for the letters."""
    words = {letter: word for word, letter in LETTERS.items()}
    return [words[letter] for letter in pattern]


def own_pattern(hf: Mapping[str, Any], freq: Any, offset: Any) -> tuple[str | None, list[str]]:
    """The pattern that a file spells out, None where it is that of `freq` and `offset`; and the problems.

    As in transformers, `indexer_types` goes before `index_topk_pattern`, and that before the two numbers.
    """
    numbers = [hf.get("num_hidden_layers"), freq, offset]
    if not all(isinstance(one, int) and one > 0 for one in numbers):
        return None, []  # reported elsewhere
    regular = schedule(*numbers)
    key = "indexer_types" if hf.get("indexer_types") is not None else "index_topk_pattern"
    given = hf.get(key)
    if given is None:
        return None, []
    if not isinstance(given, str | list) or set(given) - {*LETTERS, *LETTERS.values()} or len(given) != numbers[0]:
        return None, [
            f"config.json: {key}={given!r} must say 'full' or 'shared' (in a string F or S) for each of the "
            f"{numbers[0]} layers."
        ]
    pattern = "".join(LETTERS.get(one, one) for one in given)
    return (None if pattern == regular else pattern), []
