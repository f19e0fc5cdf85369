"""Reload the result with `transformers`, as anybody would, and let it read image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loongforge.core.quickstart.vlm.digits import QUESTION

BATCH = 64
"""Images at once."""
LONGEST_ANSWER = 4
"""Tokens."""


def read_images(model_folder: Path, files: Sequence[Path]) -> list[str]:
    """What the model in a Hugging Face directory answers about every image file."""
    import torch
    import transformers
    from PIL import Image

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    processor: Any = transformers.AutoProcessor.from_pretrained(model_folder)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(model_folder, dtype=torch.float32)
    answers: list[str] = []
    for first in range(0, len(files), BATCH):
        chats: list[Any] = []
        for file in files[first : first + BATCH]:
            with Image.open(file) as image:
                parts = [{"type": "image", "image": image.convert("RGB")}, {"type": "text", "text": QUESTION}]
            chats.append([{"role": "user", "content": parts}])
        # Every question has the same length, so nothing is padded.
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_tensors="pt", return_dict=True
        )
        said = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        said = said[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(said, skip_special_tokens=True)]
    return answers
