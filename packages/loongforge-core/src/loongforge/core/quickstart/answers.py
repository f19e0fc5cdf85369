"""Reload the result with `transformers`, as anybody would, and ask it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loongforge.core.errors import CheckpointError
from loongforge.core.quickstart.questions import Question
from loongforge.core.quickstart.tokenizer import token_stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the model says, beside what the documentation says."""

    question: str
    answer: str
    documentation: str


def ask(model_folder: Path, questions: Sequence[Question], longest: int) -> list[Answer]:
    """Greedy answers of at most `longest` tokens.

    Raises `CheckpointError` when `transformers` makes other tokens of the questions than training did: the answers
    would say nothing about the model.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    ours = token_stream(model_folder, [one.question for one in questions]).tolist()
    theirs = [token for one in questions for token in (*tokenizer(one.question)["input_ids"], tokenizer.eos_token_id)]
    if ours != theirs:
        raise CheckpointError(
            f"transformers {transformers.__version__} makes other tokens with the tokenizer in {model_folder} than "
            "training did. Install transformers>=5."
        )
    answers: list[Answer] = []
    for one in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": one.question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        said = model.generate(**inputs, max_new_tokens=longest, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        answers.append(Answer(question=one.question, answer=text, documentation=one.answer))
    return answers
