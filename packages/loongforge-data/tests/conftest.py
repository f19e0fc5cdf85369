"""Tiny tokenizers, templates and requests, built in place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from loongforge.core.config.run import DataConfig
from loongforge.core.data.contract import Clip, Placed, PlacedItem, SourceRequest, VisualItem

sys.path.insert(0, str(Path(__file__).parent))  # for `seeing_rows`

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

GENERATION = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

THINKING = """{%- if tools %}
{{- '<|im_start|>system\\ntools:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- set said = message.content | default('') %}
{%- set thought = message.reasoning_content | default('') %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}
{%- endif %}
{{- said }}
{%- for call in message.tool_calls or [] %}
{{- '\\n<tool_call>' + (call | tojson) + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

HEADERS = """{{- bos_token }}
{%- for message in messages %}
{%- if message.role not in ['system', 'user', 'assistant'] %}
{{- raise_exception('unknown role ' + message.role) }}
{%- endif %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

BRACKETS = """{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}{% endif %}
{%- endfor %}"""

TEMPLATES = {
    "chatml": CHATML,
    "generation": GENERATION,
    "thinking": THINKING,
    "headers": HEADERS,
    "brackets": BRACKETS,
}
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<s>",
)
TEXTS = (
    "The loong forges models out of text.",
    "assistant user system hello world, how are you today? I am fine, thank you.",
    "def forge(loong):\n    return [scale for scale in loong]\n",
    "one paragraph\n\nanother paragraph\n\n",
    "naïve café, 数据 and emoji \U0001f409 too.",
)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer as Hugging Face writes it, with offsets trimmed and a ChatML template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.enable_truncation(max_length=7)  # must not shorten training data
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "bos_token": {"__type": "AddedToken", "content": "<s>"}})
    )
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    """Chat templates of several styles by name."""
    return TEMPLATES


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list[Any]], Path]:
    """Writes a `.jsonl` file."""
    return _write_rows


@pytest.fixture(scope="session")
def make_request() -> Callable[..., SourceRequest]:
    """`make_request(cache, **changes)`: a request with small numbers, changed as asked."""
    return _make_request


def _write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _make_request(cache: Path, **changes: Any) -> SourceRequest:
    values: dict[str, Any] = {
        "paths": (),
        "split": None,
        "part": "train",
        "seq_length": 16,
        "num_samples": 64,
        "seed": 7,
        "shuffle": True,
        "packing": False,
        "segment_multiple": 1,
        "vocab_size": 512,
        "tokenizer_path": None,
        "tokenizer_type": None,
        "chat_template": None,
        "cache": cache,
        "text_field": "text",
        "messages_field": "messages",
        "train_on_prompt": False,
        "overlong": "truncate",
        "loss_mask_eod": False,
        "is_builder": True,
        "barrier": lambda: None,
    }
    return SourceRequest(**{**values, **changes})


SIGHT = ("<see>", "<pad>", "<frame>", "<seen>")


@dataclass(frozen=True)
class TinyProcessor:
    """Features of 8 x 8 pixels: an image is cut, two frames of a video are an item of their own with a time before."""

    position_rank: int = 3
    fps: float = 2.0

    image_text = "<see><pad><seen>"
    video_text = "<see><frame><seen>"
    marks = SIGHT

    def with_limits(self, data: DataConfig) -> TinyProcessor:
        return replace(self, fps=data.fps or self.fps)

    def image(self, pixels: np.ndarray) -> Placed:
        return self._image(*pixels.shape[:2], self._patches(pixels[None]))

    def image_size(self, height: int, width: int) -> Placed:
        return self._image(height, width, None)

    def frames(self, clip: Clip) -> np.ndarray:
        return np.arange(0, clip.frames, max(1, round(clip.fps / self.fps)))

    def video(self, clip: Clip, pixels: np.ndarray) -> Placed:
        return self._video(clip, self._patches(pixels))

    def video_size(self, clip: Clip) -> Placed:
        return self._video(clip, None)

    def position_ids(self, length: int, items: Sequence[PlacedItem]) -> np.ndarray:
        """Not those of any model: row 1 stands still in an item, row 2 counts items."""
        rows = np.tile(np.arange(length, dtype=np.int64), (self.position_rank, 1))
        for number, item in enumerate(items, start=1):
            size = item.grid[0] * item.grid[1] * item.grid[2] // 4
            assert item.start + size <= length
            rows[1:2, item.start : item.start + size] = item.start
            rows[2:3, item.start :] = number
        return rows

    def _image(self, height: int, width: int, patches: np.ndarray | None) -> Placed:
        grid = (1, height // 8 * 2, width // 8 * 2)
        item = VisualItem(grid=grid, features=grid[1] * grid[2] // 4, placeholder="<pad>", patches=patches)
        return Placed(pieces=("<see>", item, "<seen>"))

    def _video(self, clip: Clip, patches: np.ndarray | None) -> Placed:
        steps, grid = -(-len(self.frames(clip)) // 2), (1, clip.height // 8 * 2, clip.width // 8 * 2)
        size = grid[1] * grid[2]
        pieces: list[str | VisualItem] = ["<see>"]
        for step in range(steps):
            part = None if patches is None else patches[step * size : (step + 1) * size]
            pieces += [f"at {step}", VisualItem(grid=grid, features=size // 4, placeholder="<frame>", patches=part)]
        return Placed(pieces=(*pieces, "<seen>"), seconds_per_grid=0.0)

    def _patches(self, frames: np.ndarray) -> np.ndarray:
        """Mean colour of every 4 x 4 square of every second frame."""
        rows, columns = frames.shape[1] // 8 * 2, frames.shape[2] // 8 * 2
        cut = frames[::2, : rows * 4, : columns * 4].reshape(-1, rows, 4, columns, 4, 3)
        return cut.mean(axis=(2, 4)).reshape(-1, 3).astype(np.float32)


@pytest.fixture(scope="session")
def processor() -> TinyProcessor:
    """Made for these tests: three rows of position ids."""
    return TinyProcessor()


@pytest.fixture(scope="session")
def seeing_tokenizer_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer with the special tokens of `processor`."""
    folder = tmp_path_factory.mktemp("seeing")
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SIGHT])
    backend.save(str(folder / "tokenizer.json"))
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_text((tokenizer_dir / name).read_text())
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with `0.png` to `5.png` of unequal sizes, `photo.jpg`, and `clip.mp4` of 9 frames at 4 per second."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(picture(8 + 8 * number, 16 + 5 * number, number)).save(folder / f"{number}.png")
    Image.fromarray(picture(32, 24, 9)).save(folder / "photo.jpg")
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(9):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(16, 32, number), format="rgb24")))
        container.mux(stream.encode())
    return folder


@pytest.fixture
def request_for(make_request, seeing_tokenizer_dir, processor, tmp_path: Path) -> Callable[..., SourceRequest]:
    def build(file: Path, **changes: Any) -> SourceRequest:
        values = {"paths": (str(file),), "tokenizer_path": str(seeing_tokenizer_dir), "seq_length": 128}
        values |= {"shuffle": False, "visual": processor, "position_rank": 3, "overlong": "error"}
        return make_request(tmp_path / "cache", **{**values, **changes})

    return build


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Random colours, uint8 `[height, width, 3]`."""
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
