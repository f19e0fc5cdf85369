"""The result in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loongforge.core.quickstart.places import Places
from loongforge.core.quickstart.stages import Record, told

REQUIRED_SHARE = 0.8
"""The held-out loss must be below this share of the unigram entropy: the model has learned how tokens follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the trainings reached, how long each stage took and where everything lies."""

    unigram_entropy: float
    """Of the held-out corpus, nats per token."""
    held_out_loss: float
    """Of the held-out corpus after pre-training, nats per token, over the same tokens."""
    sft_held_out_loss: float
    """Of the held-out answers after fine-tuning, nats per token."""
    stages: tuple[Record, ...]
    places: Places

    @property
    def passed(self) -> bool:
        """Whether the model clearly beats the unigram entropy."""
        return self.held_out_loss < REQUIRED_SHARE * self.unigram_entropy

    @property
    def verdict(self) -> str:
        """Both numbers in one sentence."""
        return (
            f"held-out loss {self.held_out_loss:.3f} nats per token, unigram entropy {self.unigram_entropy:.3f}: "
            f"{1 - self.held_out_loss / self.unigram_entropy:.1%} below it (at least {1 - REQUIRED_SHARE:.0%} wanted)"
        )

    @property
    def closing(self) -> str:
        """What to say at the end."""
        return (
            f"Fine-tuned, held-out answers: {self.sft_held_out_loss:.3f} nats per token. The commands above can be "
            "repeated and changed: --tensor-model-parallel-size 2, for example, splits every layer over two workers."
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "passed": self.passed,
            "unigram_entropy": self.unigram_entropy,
            "held_out_loss": self.held_out_loss,
            "sft_held_out_loss": self.sft_held_out_loss,
            **told(self.stages),
            "paths": dict(self.paths()),
        }

    def paths(self) -> Iterator[tuple[str, str]]:
        """What lies where."""
        places = self.places
        yield "model", str(places.model)
        yield "loss curve", str(places.curve)
        yield "pre-training", str(places.pretrain)
        yield "fine-tuning", str(places.finetune)
        yield "tokenizer", str(places.tokenizer)
        yield "corpus", str(places.corpus)
        yield "questions", str(places.questions)
        yield "summary", str(places.summary)
