"""A configuration on a number of ranks, before anyone has asked whether it can run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from loongforge.core.config.run import RunConfig
from loongforge.core.lora.matrices import Inventory
from loongforge.core.lora.targets import Adapter, adapters, inventory_of
from loongforge.core.model.geometry import EncoderGeometry, ProjectorGeometry, TransformerGeometry
from loongforge.core.plan.layout import EncoderLayout, Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A configuration on a number of ranks, not yet known to be legal."""

    config: RunConfig
    world: int
    """All ranks of the job."""
    geometry: TransformerGeometry
    encoder_geometry: EncoderGeometry | None = None
    projector_geometry: ProjectorGeometry | None = None
    matrices: Inventory | None = None
    """Where adapters can be; None when the run asks for none."""

    @classmethod
    def of(cls, config: RunConfig, world: int) -> Self:
        """The candidate of `config`, with the shapes that its families' configs give."""
        model = config.model
        foundation: TransformerGeometry = model.foundation.geometry.geometry()
        encoder: EncoderGeometry | None = model.image_encoder.geometry.geometry() if model.image_encoder else None
        projector: ProjectorGeometry | None = None
        if model.image_projector:
            projector = model.image_projector.geometry.geometry()
        made = cls(
            config=config,
            world=world,
            geometry=foundation,
            encoder_geometry=encoder,
            projector_geometry=projector and _sized(projector, encoder, foundation),
        )
        return replace(made, matrices=inventory_of(made)) if config.lora.on else made

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters the run asks for."""
        return () if self.matrices is None else adapters(self.config.lora, self.matrices.matrices)

    @property
    def layout(self) -> Layout:
        """The foundation's axes."""
        return Layout.of(self.config.parallel, self.world)

    @property
    def encoder(self) -> EncoderLayout | None:
        """Where the encoder runs; None without one."""
        return EncoderLayout.of(self.config.model, self.config.parallel, self.world)

    @property
    def global_batch_size(self) -> int:
        """As given, or one micro-batch per data parallel rank."""
        train = self.config.train
        return train.global_batch_size or train.micro_batch_size * self.layout.dp

    @property
    def train_iters(self) -> int:
        """As given, or the whole steps that train_samples fill; 0 when neither says."""
        train = self.config.train
        return train.train_iters or (train.train_samples or 0) // self.global_batch_size


def _sized(
    projector: ProjectorGeometry, encoder: EncoderGeometry | None, foundation: TransformerGeometry
) -> ProjectorGeometry:
    """The projector with the sizes of its neighbours where it states none."""
    given = projector.input_size
    return replace(
        projector,
        input_size=encoder.hidden_size if given is None and encoder else given,
        output_size=foundation.hidden_size if projector.output_size is None else projector.output_size,
    )


def divisors(number: int) -> list[int]:
    """Whole numbers that divide `number`, ascending."""
    return [size for size in range(1, number + 1) if number % size == 0]
