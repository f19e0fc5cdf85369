"""A byte-level BPE tokenizer trained on the corpus, as a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
"""Special tokens; their ids are 0, 1 and 2."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML; what lies between `generation` and `endgeneration` is what the assistant is trained on."""


def train_tokenizer(
    texts: Sequence[str],
    vocab_size: int,
    folder: Path,
    *,
    chat_template: str = CHAT_TEMPLATE,
    more_special: Sequence[str] = (),
) -> int:
    """Train on `texts`, write the directory that `transformers.AutoTokenizer` reads; the number of tokens it knows.

    Fewer than `vocab_size` when the texts are too short to fill it. `more_special` tokens get the ids from 3 on.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    special = [END_OF_TEXT, START_OF_TURN, END_OF_TURN, *more_special]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,  # pyright: ignore[reportArgumentType]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    config = {
        **roles,
        "additional_special_tokens": special[1:],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "special_tokens_map.json", {**roles, "additional_special_tokens": special[1:]})
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return tokenizer.get_vocab_size()


def token_stream(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """The tokens of all texts, int64 `[tokens]`, each text closed by the end-of-text token, as training sees them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.array([token for piece in pieces for token in (*piece.ids, end)], dtype=np.int64)


def _write(file: Path, content: dict[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
