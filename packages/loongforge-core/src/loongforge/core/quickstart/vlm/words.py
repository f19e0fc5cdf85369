"""What turns words and image files into inputs: a tokenizer, a chat template, and how images are resized."""

from __future__ import annotations

import json
from pathlib import Path

from loongforge.core.quickstart.tokenizer import train_tokenizer
from loongforge.core.quickstart.vlm.digits import QUESTION, WORDS
from loongforge.core.quickstart.vlm.recipe import MERGE, PATCH, TEMPORAL_PATCH

VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- set said -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}
{%- else -%}{{- '<|vision_start|><|' + part['type'] + '_pad|><|vision_end|>' -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endset -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- said + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- said + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML with images and videos among the parts of a message."""


def write_words(vocab_size: int, area: int, folder: Path) -> int:
    """Write what `transformers.AutoProcessor` reads, and training too: the number of tokens.

    `area` in pixels is what every image is resized to.
    """
    texts = ["user\n", "assistant\n", QUESTION, *WORDS]
    known = train_tokenizer(texts, vocab_size, folder, chat_template=CHAT_TEMPLATE, more_special=VISION_TOKENS)
    shared = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": PATCH,
        "temporal_patch_size": TEMPORAL_PATCH,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": area, "longest_edge": area},  # areas, in spite of their names
    }
    for name, kind in (
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}),
        ("video_preprocessor_config.json", {"video_processor_type": "Qwen3VLVideoProcessor"}),
    ):
        (folder / name).write_text(json.dumps({**kind, **shared}, indent=2) + "\n", encoding="utf-8")
    return known
