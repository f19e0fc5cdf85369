"""Models of Qwen3-VL's shape, and steps of samples with few, many, large and no images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

IMAGE, VIDEO, START, END = 1, 2, 3, 4
"""Special tokens; text is made of those after them."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and what it reads."""

    hidden: int
    layers: int
    heads: int
    groups: int
    ffn: int
    vocabulary: int
    encoder_hidden: int
    encoder_layers: int
    encoder_heads: int
    encoder_ffn: int
    levels: tuple[int, ...]
    """Encoder layers whose features the first layers of the foundation get too."""
    patch: int
    length: int
    """Tokens of a sequence."""
    sequences: int
    """Of a step."""
    typical: float
    """Median of an image's features."""


SIZES = {
    "tiny": Size(
        hidden=64, layers=8, heads=4, groups=4, ffn=96, vocabulary=160, encoder_hidden=48, encoder_layers=3,
        encoder_heads=4, encoder_ffn=64, levels=(0, 1), patch=4, length=64, sequences=8, typical=6,
    ),
    "28m": Size(
        hidden=384, layers=8, heads=8, groups=4, ffn=1024, vocabulary=8192, encoder_hidden=256, encoder_layers=6,
        encoder_heads=4, encoder_ffn=768, levels=(2, 4), patch=16, length=384, sequences=8, typical=36,
    ),
}  # fmt: skip
SPREAD = 0.9
"""Standard deviation of the logarithm of an image's area."""
TEXT_ONLY, HUGE = 0.25, 0.1
"""Share of sequences without an image, and of those that are one large image."""
MOST = 4
"""Images of a sequence."""


def make_model(size: Size, directory: Path) -> None:
    """A random Qwen3-VL written by transformers."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    width = size.hidden // size.heads
    height = width // 2 // 4
    rope = {
        "rope_type": "default", "rope_theta": 1e6, "mrope_interleaved": True,
        "mrope_section": [width // 2 - 2 * height, height, height],
    }  # fmt: skip
    text = {
        "vocab_size": size.vocabulary, "hidden_size": size.hidden, "intermediate_size": size.ffn,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.groups,
        "head_dim": width, "max_position_embeddings": 2 * size.length, "tie_word_embeddings": False,
        "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": size.encoder_layers, "hidden_size": size.encoder_hidden, "intermediate_size": size.encoder_ffn,
        "num_heads": size.encoder_heads, "patch_size": size.patch, "in_channels": 3, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "out_hidden_size": size.hidden, "num_position_embeddings": 576,
        "hidden_act": "gelu_pytorch_tanh", "deepstack_visual_indexes": list(size.levels),
    }  # fmt: skip
    torch.manual_seed(0)
    config = Qwen3VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    Qwen3VLForConditionalGeneration(config).save_pretrained(directory)


def images_of(size: Size, generator: np.random.Generator) -> list[tuple[int, int]]:
    """(height, width) in features of the images of one sequence, which leave it an eighth of its tokens for text."""
    kind = generator.random()
    if kind < TEXT_ONLY:
        return []
    room = size.length - size.length // 8
    if kind < TEXT_ONLY + HUGE:
        areas = [0.75 * size.length]
    else:
        areas = (size.typical * np.exp(SPREAD * generator.standard_normal(generator.integers(1, MOST + 1)))).tolist()
    found: list[tuple[int, int]] = []
    for area in areas:
        stretch = math.exp(0.3 * generator.standard_normal())
        height = max(1, round(math.sqrt(area) * stretch))
        width = max(1, round(area / height))
        if height * width + 2 <= room:
            found.append((height, width))
            room -= height * width + 2
    return found


def sequence(size: Size, seed: tuple[int, int], *, images: bool) -> dict[str, Any]:
    """One sequence of random text with its images at random places, as the loader collates a batch of one."""
    import torch

    from loongforge.core.data.contract import PlacedItem
    from loongforge.models.vision.positions import multimodal_positions

    generator = np.random.default_rng(seed)
    shapes = images_of(size, generator) if images else []
    text = generator.integers(END + 1, size.vocabulary, size.length + 1)
    spare = size.length - sum(height * width + 2 for height, width in shapes)
    gaps = np.diff(np.sort(generator.integers(0, spare + 1, len(shapes))), prepend=0)
    items, seen, at = [], np.zeros(size.length + 1, dtype=bool), 0
    for gap, (height, width) in zip(gaps.tolist(), shapes, strict=True):
        at += gap
        text[at], text[at + 1 : at + 1 + height * width], text[at + 1 + height * width] = START, IMAGE, END
        seen[at + 1 : at + 1 + height * width] = True
        items.append(PlacedItem(start=at + 1, grid=(1, 2 * height, 2 * width), seconds_per_grid=0.0))
        at += height * width + 2
    positions = multimodal_positions(size.length, items, merge=2, tokens_per_second=0.0)
    made: dict[str, Any] = {
        "tokens": torch.from_numpy(text[None, :-1].copy()),
        "labels": torch.from_numpy(text[None, 1:].copy()),
        "loss_mask": torch.from_numpy((~seen[None, 1:]).astype(np.float32)),
        "position_ids": torch.from_numpy(positions[:, None].copy()),
        "sample_ids": torch.tensor([seed[1]]),
        "grid": torch.tensor([item.grid for item in items], dtype=torch.int64).view(-1, 3),
        "visual_positions": torch.from_numpy(np.flatnonzero(seen[:-1])),
        "items_of": torch.tensor([len(items)]),
    }
    if patches := 4 * int(seen.sum()):
        noise = generator.standard_normal((patches, 3 * 2 * size.patch**2), dtype=np.float32)
        made["pixels"] = torch.from_numpy(noise)
    return made


def step_of(size: Size, number: int, *, images: bool) -> list[dict[str, Any]]:
    """All sequences of a step, the same in every process."""
    return [sequence(size, (number, place), images=images) for place in range(size.sequences)]
