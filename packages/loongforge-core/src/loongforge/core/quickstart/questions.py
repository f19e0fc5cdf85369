"""Questions and answers for fine-tuning, made from the same documentation strings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from loongforge.core.quickstart.corpus import PARTS, Document, write_rows

SHORTEST, LONGEST = 20, 300
"""Characters of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question with the answer the documentation gives."""

    question: str
    answer: str

    def row(self) -> dict[str, object]:
        """As a row of a fine-tuning file."""
        said = (("user", self.question), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": content} for role, content in said]}


def ask_about(document: Document) -> Question | None:
    """What a document can be asked: None for private names and for a first paragraph that is no short answer."""
    answer = " ".join(document.text.split("\n\n")[0].split())
    private = any(part.startswith("_") for part in document.name.split("."))
    if private or not SHORTEST <= len(answer) <= LONGEST:
        return None
    return Question(question=f"What does `{document.name}` do?", answer=answer)


def write_questions(documents: list[Document], folder: Path) -> tuple[int, int]:
    """Write `train.jsonl` and `valid.jsonl` (field `messages`) into `folder`; the number of rows in each.

    What the corpus holds out is held out here too: nothing about it is ever trained on.
    """
    asked = [(document.held_out, question) for document in documents if (question := ask_about(document))]
    parts = [[question for held_out, question in asked if held_out is wanted] for wanted in (False, True)]
    for name, part in zip(PARTS, parts, strict=True):
        write_rows(folder / f"{name}.jsonl", (question.row() for question in part))
    return len(parts[0]), len(parts[1])


def read_questions(file: Path, count: int | None = None) -> list[Question]:
    """`count` rows of a file, evenly spaced over it; all of them when there are fewer or no count is given."""
    rows = [json.loads(line)["messages"] for line in file.read_text(encoding="utf-8").splitlines()]
    chosen = rows[:: max(1, len(rows) // count)][:count] if count else rows
    return [Question(question=user["content"], answer=assistant["content"]) for user, assistant in chosen]
