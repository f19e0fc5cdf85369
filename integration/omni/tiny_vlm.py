"""Tiny vision-language checkpoints as transformers writes them: all sizes differ, no weight has a special value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

IMAGE, VIDEO, START, END = 120, 121, 122, 123
VOCABULARY = 131
SPECIAL = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """No ones, no zeros: a forgotten norm or bias must show. Matrices large enough that attention is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(0.08 * noise)
            elif "norm" in name or "ln_q" in name:
                parameter.copy_(noise.mul(0.2).add(0.0 if name.endswith("bias") else 1.0))
            else:
                parameter.copy_(0.2 * noise)


def qwen3_vision(*, deepstack: bool = True) -> dict[str, Any]:
    """The tower of Qwen3-VL."""
    return {
        "depth": 4, "hidden_size": 48, "intermediate_size": 56, "num_heads": 4, "patch_size": 4, "in_channels": 3,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 36,
        "hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": [0, 2] if deepstack else [],
    }  # fmt: skip


def qwen2_5_vision() -> dict[str, Any]:
    """The tower of Qwen2.5-VL: windows of 2 x 2 features, one layer that sees everything."""
    return {
        "depth": 3, "hidden_size": 48, "intermediate_size": 56, "num_heads": 4, "patch_size": 4, "in_channels": 3,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16, "out_hidden_size": 64,
        "fullatt_block_indexes": [1], "hidden_act": "silu", "tokens_per_second": 2,
    }  # fmt: skip


def make_qwen2_5_vl(path: Path) -> Path:
    """Qwen2.5-VL."""
    import transformers as hf

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    config = hf.Qwen2_5_VLConfig(
        vision_config=qwen2_5_vision(), text_config={**TEXT, "rope_parameters": rope}, **SPECIAL
    )
    return _saved(hf.Qwen2_5_VLForConditionalGeneration(config), path)


def make_qwen3_vl(path: Path) -> Path:
    """Qwen3-VL, dense."""
    import transformers as hf

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**TEXT, "head_dim": 16, "rope_parameters": rope}
    config = hf.Qwen3VLConfig(vision_config=qwen3_vision(), text_config=text, **SPECIAL)
    return _saved(hf.Qwen3VLForConditionalGeneration(config), path)


def make_qwen3_vl_moe(path: Path) -> Path:
    """Qwen3-VL with a mixture of experts."""
    import transformers as hf

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "router_aux_loss_coef": 0.0}
    text = {**TEXT, "head_dim": 16, "rope_parameters": rope, **experts}
    config = hf.Qwen3VLMoeConfig(vision_config=qwen3_vision(), text_config=text, **SPECIAL)
    return _saved(hf.Qwen3VLMoeForConditionalGeneration(config), path)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "qwen3_vl_moe": make_qwen3_vl_moe,
}


def _saved(model: Any, path: Path) -> Path:
    randomise(model)
    model.save_pretrained(path, max_shard_size="200KB")
    return path
