"""The result in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loongforge.core.quickstart.stages import Record, told
from loongforge.core.quickstart.vlm.places import VlmPlaces

REQUIRED_ACCURACY = 0.9
"""More than this share of the held-out images must be read right; guessing reads one in ten."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmSummary:
    """What the training reached, how long each stage took and where everything lies."""

    images: int
    """Held-out images."""
    right: int
    """Those that the reloaded model reads right."""
    held_out_loss: float
    """Of the held-out answers, nats per token."""
    stages: tuple[Record, ...]
    places: VlmPlaces

    @property
    def accuracy(self) -> float:
        """Share of the held-out images that are read right."""
        return self.right / self.images

    @property
    def passed(self) -> bool:
        """Whether the model reads well enough."""
        return self.accuracy > REQUIRED_ACCURACY

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        return (
            f"reloaded with transformers, the model reads {self.right} of {self.images} held-out images right: "
            f"{self.accuracy:.1%} (more than {REQUIRED_ACCURACY:.0%} wanted)"
        )

    @property
    def closing(self) -> str:
        """What to say at the end."""
        return (
            f"Held-out answers: {self.held_out_loss:.3f} nats per token. The command above can be repeated and "
            "changed: --enable-full-hetero-dp, for example, runs the encoder ahead of the foundation."
        )

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        return {
            "passed": self.passed,
            "accuracy": self.accuracy,
            "held_out_images": self.images,
            "held_out_loss": self.held_out_loss,
            **told(self.stages),
            "paths": dict(self.paths()),
        }

    def paths(self) -> Iterator[tuple[str, str]]:
        """What lies where."""
        places = self.places
        yield "predictions", str(places.sheet)
        yield "model", str(places.model)
        yield "loss curve", str(places.curve)
        yield "training", str(places.train)
        yield "run file", str(places.model_yaml)
        yield "tokenizer", str(places.tokenizer)
        yield "shards", str(places.shards)
        yield "held out", str(places.held_out)
        yield "summary", str(places.summary)
