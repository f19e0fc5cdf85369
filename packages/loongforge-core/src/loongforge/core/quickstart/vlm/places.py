"""Where everything of a quickstart with images lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loongforge.core.quickstart.places import Common


@dataclass(frozen=True, slots=True)
class VlmPlaces(Common):
    """Files and folders below the output directory."""

    @property
    def stages(self) -> Path:
        """One file per stage; another folder than that of the quickstart with text, so that neither takes the other's
        directory for its own."""
        return self.output / "stages-vlm"

    @property
    def shards(self) -> Path:
        """webdataset shards: `train/*.tar` and `valid/*.tar`."""
        return self.output / "shards"

    @property
    def held_out(self) -> Path:
        """The held-out images as plain files."""
        return self.output / "held_out"

    @property
    def train(self) -> Path:
        """Run of the training: checkpoints, metrics.jsonl, config.yaml."""
        return self.output / "train"

    @property
    def sheet(self) -> Path:
        """Held-out images with what the model reads in them."""
        return self.output / "predictions.png"

    @property
    def entries(self) -> tuple[Path, ...]:
        """Everything a quickstart writes directly below the output directory."""
        return (*self.shared, self.shards, self.held_out, self.train, self.sheet)
