"""Multi-token prediction of the families whose releases have further layers for it: their fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from loongforge.models.parts.checks import wrong_rates
from loongforge.models.parts.decoder import Decoder

COUNT = "num_nextn_predict_layers"
"""Key of `config.json` that says how many further layers a checkpoint has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicting(Decoder):
    """A decoder whose releases have further layers, each of which predicts one more token ahead."""

    TRAINING: ClassVar[tuple[str, ...]] = ("mtp_num_layers", "mtp_loss_scaling_factor")
    """Fields that say how the model trains: a checkpoint's `config.json` has no word about them."""

    mtp_num_layers: int = 0
    """Further layers that predict one more token ahead each (multi-token prediction) and train with the model; 0 leaves
    them out, those that a checkpoint has too."""
    mtp_loss_scaling_factor: float = 0.1
    """Factor of the further layers' mean loss while training; not part of `config.json`."""

    def prediction_problems(self) -> list[str]:
        """Impossible values of the fields of this class."""
        count, problems = self.mtp_num_layers, wrong_rates(self.LABEL, self, "mtp_loss_scaling_factor")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            problems.append(f"{self.LABEL}: mtp_num_layers must be a whole number of at least 0, got {count!r}.")
        return problems

    def prediction_geometry(self) -> dict[str, Any]:
        """Fields of `TransformerGeometry`."""
        return {"prediction_layers": self.mtp_num_layers, "prediction_loss_coeff": self.mtp_loss_scaling_factor}


def wrong_prediction_count(hf: Mapping[str, Any]) -> list[str]:
    """What a file has of further layers is a number; how many of them train, the run says."""
    count = hf.get(COUNT, hf.get("num_mtp_layers")) or 0
    if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
        return []
    return [f"config.json: {COUNT}={count!r} must be a whole number of at least 0."]
