"""What the documentation takes for granted: directories with small Hugging Face models, text, and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def make_tokenizer(path: Path, marks: tuple[str, ...] = MARKS) -> None:
    """A byte-level tokenizer with Qwen's chat markers: every text has tokens, no file is needed."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def make_model(path: Path) -> None:
    """A Qwen3 that trains in seconds, written by transformers with the tokenizer beside it."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        eos_token_id=258,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    make_tokenizer(path)


TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_heads": 4,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
}
SEES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}


def make_qwen3_vl(path: Path) -> None:
    """A Qwen3-VL that trains in seconds: two deepstack levels, patches of the released size."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "depth": 4, "patch_size": 16, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2],
        "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config={**TEXT, "vocab_size": 263, "head_dim": 16, "rope_parameters": {**SEES, "mrope_interleaved": True}},
        vision_config={**VISION, **vision},
        **marks_of(263),
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(path)
    make_tokenizer(path, (*MARKS, *VISION_MARKS))


def make_qwen2_5_vl(path: Path) -> None:
    """A Qwen2.5-VL, wanted for its encoder."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    vision = {
        "depth": 4, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1, 3], "hidden_act": "silu",
        "tokens_per_second": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "vocab_size": 263, "rope_parameters": SEES},
        vision_config={**VISION, **vision},
        **marks_of(263),
    )
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    make_tokenizer(path, (*MARKS, *VISION_MARKS))


def marks_of(vocab_size: int) -> dict[str, int]:
    """Ids of the vision marks, the last ones of the vocabulary."""
    keys = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {key: vocab_size - len(keys) + number for number, key in enumerate(keys)}


def make_llama(path: Path) -> None:
    """A LLaMA whose tokenizer has no mark for images."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **TEXT,
        vocab_size=259,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=256,
        eos_token_id=258,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    make_tokenizer(path)


def make_pictures(folder: Path) -> None:
    """`pictures.jsonl`: conversations about coloured squares of unequal size in `pictures/`, and some of text alone."""
    from PIL import Image

    colours = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}
    (folder / "pictures").mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(24):
        name = list(colours)[number % 3]
        picture = f"pictures/{number:02d}.png"
        Image.new("RGB", (40 + 8 * (number % 5), 40 + 8 * (number % 3)), colours[name]).save(folder / picture)
        asked = {"role": "user", "content": "<image>Which colour?"}
        rows.append({"messages": [asked, {"role": "assistant", "content": name}], "images": [picture]})
        if number % 4 == 0:
            talk = [{"role": "user", "content": "Is red a colour?"}, {"role": "assistant", "content": "Yes."}]
            rows.append({"messages": talk})
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_data(folder: Path) -> None:
    """`text.jsonl` with documents, `more.jsonl` with others, `chats.jsonl` with conversations."""
    for name, subject in (("text.jsonl", "keel"), ("more.jsonl", "drum")):
        rows = [{"text": f"Boat number {number} has a {subject} of {number * 7} parts."} for number in range(200)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} and {number}?"},
                {"role": "assistant", "content": f"{2 * number}."},
            ]
        }
        for number in range(100)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `qwen3/`, `qwen3_vl/`, `qwen2_5_vl/` and `llama/`, the files `text.jsonl`, `more.jsonl`,
    `chats.jsonl` and `pictures.jsonl` with its folder of images; tests work on copies."""
    folder = tmp_path_factory.mktemp("prepared")
    make_model(folder / "qwen3")
    make_qwen3_vl(folder / "qwen3_vl")
    make_qwen2_5_vl(folder / "qwen2_5_vl")
    make_llama(folder / "llama")
    make_data(folder)
    make_pictures(folder)
    return folder
