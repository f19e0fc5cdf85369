"""Qwen1.5, Qwen2 and Qwen2.5, as the Chat and Instruct releases say it."""

from __future__ import annotations

from typing import Any


def config(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": 0.02,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "max_window_layers": layers,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": groups,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab,
    }


def first(*sizes: Any, **more: Any) -> dict[str, Any]:
    """Qwen1.5; where its sliding window would begin, were it on, is left out."""
    found = {**config(*sizes), **more}
    del found["max_window_layers"]
    return found


RELEASED: dict[str, dict[str, Any]] = {
    "qwen1_5_0_5b": first(24, 1024, 2816, 16, 16, 151936, True),
    "qwen1_5_1_8b": first(24, 2048, 5504, 16, 16, 151936, False),
    "qwen1_5_4b": first(40, 2560, 6912, 20, 20, 151936, False, rope_theta=5000000.0),
    "qwen1_5_7b": first(32, 4096, 11008, 32, 32, 151936, False),
    "qwen1_5_14b": first(40, 5120, 13696, 40, 40, 152064, False),
    "qwen1_5_32b": first(64, 5120, 27392, 40, 8, 152064, False),
    "qwen1_5_72b": first(80, 8192, 24576, 64, 64, 152064, False),
    "qwen1_5_110b": first(80, 8192, 49152, 64, 8, 152064, False),
    "qwen2_0_5b": config(24, 896, 4864, 14, 2, 151936, True),
    "qwen2_1_5b": config(28, 1536, 8960, 12, 2, 151936, True),
    "qwen2_7b": config(28, 3584, 18944, 28, 4, 152064, False),
    "qwen2_72b": config(80, 8192, 29568, 64, 8, 152064, False),
    "qwen2_5_0_5b": config(24, 896, 4864, 14, 2, 151936, True),
    "qwen2_5_1_5b": config(28, 1536, 8960, 12, 2, 151936, True),
    "qwen2_5_3b": config(36, 2048, 11008, 16, 2, 151936, True),
    "qwen2_5_7b": config(28, 3584, 18944, 28, 4, 152064, False),
    "qwen2_5_14b": config(48, 5120, 13824, 40, 8, 152064, False),
    "qwen2_5_32b": config(64, 5120, 27648, 40, 8, 152064, False),
    "qwen2_5_72b": config(80, 8192, 29568, 64, 8, 152064, False),
}

PARAMETERS = {
    "qwen1_5_0_5b": 463_987_712,
    "qwen1_5_1_8b": 1_836_828_672,
    "qwen1_5_4b": 3_950_369_280,
    "qwen1_5_7b": 7_721_324_544,
    "qwen1_5_14b": 14_167_290_880,
    "qwen1_5_32b": 32_512_218_112,
    "qwen1_5_72b": 72_287_920_128,
    "qwen1_5_110b": 111_209_914_368,
    "qwen2_0_5b": 494_032_768,
    "qwen2_1_5b": 1_543_714_304,
    "qwen2_7b": 7_615_616_512,
    "qwen2_72b": 72_706_203_648,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
}
EXPECTED = {"sliding_window": None}
