"""What the trainer asks of a foreign checkpoint format (`loongforge.checkpoints`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection

    from loongforge.core.lora.targets import AdapterSet
    from loongforge.core.megatron.groups import World
    from loongforge.core.model.weights import WeightTable


@dataclass(frozen=True, kw_only=True)
class WeightPart:
    """One component's share of a movement of weights."""

    component: str
    """`foundation`, `image_encoder`, `image_projector`."""
    chunks: list[torch.nn.Module]
    """Unwrapped modules of this rank; empty where it holds none of the component."""
    table: WeightTable
    """Hugging Face names as they are in the directory."""
    groups: ProcessGroupCollection | None
    """The component's own: `tp`, `pp`, `dp_cp`, and `ep`, `expt_tp`, `tp_ep` and `expt_dp` where it has experts; None
    where this rank holds none of it."""
    vocab_size: int = 0
    """Rows of the vocabulary without padding; foundation only."""


@dataclass(frozen=True, kw_only=True)
class WeightMove:
    """One movement of weights between a directory and this rank's model chunks.

    `FormatSpec.load` is called as `load(move) -> MoveReport` and fills the parameters in place; `FormatSpec.save` is
    called as `save(move) -> MoveReport` and writes the directory so that it appears complete or not at all. Both are
    collective: every rank calls them.
    """

    path: Path
    parts: tuple[WeightPart, ...]
    """Components whose weights are in this directory, in the order they are written; on every rank the same ones."""
    world: World
    """For words between ranks; where tensors are split, a part's own groups say."""
    config: dict[str, Any]
    """Contents of `config.json` (save only)."""
    travel: Path | None = None
    """Directory whose tokenizer, chat template and generation config travel along (save only)."""
    whole: bool = True
    """Whether the parts are everything the directory holds; else its other tensors are left alone (load only)."""
    dtype: torch.dtype | None = None
    """Type of the written tensors; as trained when None (save only)."""
    adapters: AdapterSet | None = None
    """What is written where the parts are adapters (save only)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveReport:
    """What moved: tensors and bytes over all ranks, and seconds."""

    tensors: int
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()
    """What a user should know of the movement, a sentence each."""
