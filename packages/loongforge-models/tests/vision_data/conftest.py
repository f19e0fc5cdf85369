"""Real files made of generated pictures, a tiny tokenizer with the special tokens, and processors as they are used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from loongforge.core.config.run import ComponentConfig, DataConfig, ModelConfig
from loongforge.models.vision.processor import QwenProcessor, qwen2_5_vl, qwen3_vl
from loongforge.models.vision.qwen2_5_vit.config import Qwen2_5VitConfig
from loongforge.models.vision.qwen3_vit.config import Qwen3VitConfig

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def picture(height: int, width: int, phase: float = 0.0) -> np.ndarray:
    """A smooth picture with edges, uint8 `[H, W, 3]`; no two phases are alike."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    waves = [np.sin(x / (3 + channel) + phase) + np.cos(y / (5 - channel) - 2 * phase) for channel in range(3)]
    pixels = (np.stack(waves, axis=-1) + 2) * 63.75
    pixels[height // 3 : height // 2, width // 4 : width // 2] = [255, 0, 120 + 100 * np.sin(phase)]
    return pixels.astype(np.uint8)


def write_video(path: Path, frames: int, fps: int, height: int, width: int) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(height, width, number / 3), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """JPEG, PNG with alpha, WebP, greyscale, palette; unequal sizes, one tiny and one long."""
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(picture(203, 311)).save(folder / "a.jpg", quality=90)
    rgba = np.dstack([picture(97, 180, 1.0), np.full((97, 180), 90, dtype=np.uint8)])
    Image.fromarray(rgba).save(folder / "b.png")
    Image.fromarray(picture(301, 120, 2.0)).save(folder / "c.webp")
    Image.fromarray(picture(24, 17, 3.0)).convert("L").save(folder / "d.png")
    Image.fromarray(picture(40, 700, 4.0)).convert("P").save(folder / "e.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 frames at 8 per second."""
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", 37, 8, 96, 140)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Bytes and the special tokens, as transformers holds one."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|im_end|>", eos_token="<|im_end|>")


@dataclass(frozen=True)
class Foundation:
    """As much of a foundation as a processor asks for."""

    position_rank: int

    def geometry(self) -> Foundation:
        return self


@pytest.fixture(scope="session")
def make_processor() -> Callable[..., QwenProcessor]:
    """`make_processor("qwen3_vl", rank=3, **data)`: of a model of the released patch sizes, with limits from `data`."""

    def make(name: str, rank: int = 3, **data: Any) -> QwenProcessor:
        sizes = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 2}
        if name == "qwen2_5_vl":
            encoder: Any = Qwen2_5VitConfig(**sizes, full_attention_layers=(0,), tokens_per_second=2)
        else:
            encoder = Qwen3VitConfig(**sizes, deepstack_layers=(0,))
        model = ModelConfig(
            foundation=ComponentConfig(family="any", geometry=Foundation(rank)),
            image_encoder=ComponentConfig(family="any", geometry=encoder),
        )
        processor = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}[name](model)
        return processor.with_limits(DataConfig(**data))

    return make
