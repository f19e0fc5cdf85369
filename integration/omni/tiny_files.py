"""A tiny Qwen3-VL as transformers saves it, and conversations about pictures and a video for it to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tiny_vlm
from PIL import Image

from loongforge.data.shards import write_shards

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LIMITS = {"shortest_edge": 64, "longest_edge": 1024}
HELD_OUT = 4
"""Rows of `valid.jsonl`."""


def make_model(path: Path) -> None:
    import transformers as hf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    images = hf.Qwen2VLImageProcessorPil(size=LIMITS, patch_size=4, merge_size=2, **half)
    videos = hf.Qwen3VLVideoProcessor(patch_size=4, merge_size=2, **half)
    processor = hf.Qwen3VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=TEMPLATE
    )
    ids = {text: tokenizer.convert_tokens_to_ids(text) for text in SPECIAL}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**tiny_vlm.TEXT, "vocab_size": len(tokenizer) + 2, "head_dim": 16, "rope_parameters": rope}
    config = hf.Qwen3VLConfig(
        vision_config=tiny_vlm.qwen3_vision(),
        text_config={**text, "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = hf.Qwen3VLForConditionalGeneration(config)
    tiny_vlm.randomise(model)
    model.save_pretrained(path, max_shard_size="300KB")
    processor.save_pretrained(path)


def make_data(path: Path) -> None:
    """Rows with one image, two, and none, some with a video; JPEG and PNG of unequal size."""
    path.mkdir()
    make_video(path / "moves.mp4")
    generator = np.random.default_rng(5)
    rows: list[dict[str, Any]] = []
    for number in range(24):
        names: list[str] = []
        for which in range((1, 2, 0)[number % 3]):
            height, width = generator.integers(9, 40, size=2).tolist()
            name = f"{number}-{which}.{('jpg', 'png')[(number + which) % 2]}"
            # Smooth waves, so that a lossy format keeps what they are.
            y, x = np.mgrid[0:height, 0:width] / (3.0 + number % 12)
            waves = np.stack([np.sin(x + 2 * which), np.cos(y - x), np.sin(y)], -1)
            Image.fromarray(((waves + 1) * 127).astype(np.uint8)).save(path / name)
            names.append(name)
        asked = "<image>" * len(names) + f"Number {number}?"
        answer = f"It has {len(names)} pictures, and is {'odd' if number % 2 else 'even'}."
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "images": names})
        if number % 8 == 3:
            messages[0]["content"] = f"<video>{asked}"
            rows[-1]["videos"] = ["moves.mp4"]
    for file, chosen in (("train", rows[:-HELD_OUT]), ("valid", rows[-HELD_OUT:])):
        (path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    samples: list[tuple[str, dict[str, bytes]]] = []
    for at, row in enumerate(rows[:-HELD_OUT]):
        media = {name: (path / name).read_bytes() for name in [*row["images"], *row.get("videos", ())]}
        samples.append((f"{at:03d}", {"json": json.dumps(row).encode(), **media}))
    write_shards(samples, path / "shards")


def make_video(path: Path) -> None:
    import av

    y, x = np.mgrid[0:24, 0:32] / 5.0
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for number in range(9):
            waves = np.stack([np.sin(x + number), np.cos(y), np.sin(y - number)], -1)
            frame = av.VideoFrame.from_ndarray(((waves + 1) * 127).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def make_text_model(path: Path, seeing: Path) -> None:
    """A tiny Qwen3 with the tokenizer of the model that sees."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(seeing)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    sizes = {**tiny_vlm.TEXT, "vocab_size": len(tokenizer) + 2, "head_dim": 16, "rope_parameters": rope}
    model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes))
    tiny_vlm.randomise(model)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
