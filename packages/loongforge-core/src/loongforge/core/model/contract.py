"""What a family's `build` is given and what it answers; how an encoder's features reach the foundation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from loongforge.core.config.run import ComponentConfig, RunConfig
    from loongforge.core.megatron.specs import Layers
    from loongforge.core.model.geometry import EncoderGeometry


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """One pipeline chunk of a foundation on one rank."""

    config: TransformerConfig
    """megatron-core's configuration, layout included."""
    groups: ProcessGroupCollection
    layers: Layers
    """The layer classes of this platform."""
    padded_vocab_size: int
    seq_length: int
    pre_process: bool
    """This chunk holds the embedding."""
    post_process: bool
    """This chunk holds the last norm and the output layer."""
    vp_stage: int | None
    """Number of this chunk on its rank, None without interleaving."""
    deepstack: int = 0
    """Feature levels that the first layers of the foundation add at image positions."""


@dataclass(frozen=True, kw_only=True)
class TowerContext:
    """An encoder or a projector on one rank of the encoder's grid."""

    run: RunConfig
    component: ComponentConfig
    groups: ProcessGroupCollection
    """The encoder grid's own: tensor parallel over `tp`, data parallel over `dp_cp`."""
    layers: Layers
    initialise: bool
    """False leaves weights unset because a checkpoint is about to fill them."""
    encoder: EncoderGeometry
    """The encoder; a projector asks it for its input."""
    output_size: int
    """Hidden size of the foundation."""


class Encoder(Protocol):
    """An `nn.Module` from patches to features; what an `image_encoder` family's `build(config, context)` returns.

    A patch is what the composition's processor cuts: a square of an image or of some frames, or a window of a sound.
    Its output is equal on all tensor parallel ranks, and so is the gradient that comes back.
    """

    def __call__(self, pixels: torch.Tensor, grid: Sequence[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Patches `[P, patch_dim]` of all items, one after the other, and each item's (t, h, w) in patches.

        Hidden states `[P, hidden]` in the order of the input: the last layer's, then those of the deepstack layers.
        """
        ...


class Projector(Protocol):
    """An `nn.Module` from an encoder's features to the foundation's width; of an `image_projector` family."""

    def __call__(self, hidden: list[torch.Tensor], grid: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """Each `[P, hidden]` to `[features, 1 + levels, output]`; features of an item stay together and in order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What the further layers of multi-token prediction see and predict: D depths of one rank's part of a micro-batch.

    At place i depth k (from 1) sees token i + k besides what the depth before made of the tokens up to i + k - 1, and
    predicts token i + k + 1. Where that is beyond the sequence, or the document in a packed row, nothing counts.
    """

    tokens: torch.Tensor
    """int64 `[D, B, S]`: the token to see; any where nothing counts."""
    labels: torch.Tensor
    """int64 `[D, B, S]`: the token to predict, likewise."""
    loss_mask: torch.Tensor
    """fp32 `[D, B, S]`."""


@dataclass(frozen=True, kw_only=True)
class Visual:
    """Features for the tokens that one rank holds of one micro-batch."""

    rows: torch.Tensor
    """`[n, 1 + levels, H]`, n may be 0."""
    positions: torch.Tensor
    """int64 `[n]`: place in this rank's hidden states `[S, B, H]`, flattened to `[S * B]`; ascending."""


BuildComponent = Any
"""`build(config, context) -> nn.Module`."""
