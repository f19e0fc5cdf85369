"""From a configuration and a world size to a legal plan, or to one error that names every problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from loongforge.core.config.run import RunConfig
from loongforge.core.errors import PlanError
from loongforge.core.lora.targets import Adapter
from loongforge.core.model.geometry import EncoderGeometry, ProjectorGeometry, TransformerGeometry
from loongforge.core.plan.layout import EncoderLayout, Layout
from loongforge.core.plan.legality import Candidate, problems
from loongforge.core.plan.stages import stage_sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A run whose layout is legal, with every number that follows from the configuration and the world size."""

    config: RunConfig
    layout: Layout
    """Axes of the foundation."""
    encoder: EncoderLayout | None
    """Where the image encoder and its projector run; None for a foundation alone."""
    geometry: TransformerGeometry
    """Shape of the foundation."""
    encoder_geometry: EncoderGeometry | None
    projector_geometry: ProjectorGeometry | None
    """With both sizes filled in from its neighbours."""
    global_batch_size: int
    """Sequences per optimizer step over all ranks."""
    num_microbatches: int
    """Forward passes per rank and optimizer step."""
    train_iters: int
    """Optimizer steps of the whole run."""
    padded_vocab_size: int
    """Rows of the embedding: the vocabulary, padded to a multiple of make_vocab_size_divisible_by x tp."""
    adapters: tuple[Adapter, ...] = ()
    """What trains in place of the model's own parameters; empty when these do."""

    @classmethod
    def of(cls, config: RunConfig, world_size: int) -> Self:
        """The plan of `config` on `world_size` ranks.

        Raises `PlanError` whose message holds every problem found, one per line, each with its remedy.
        """
        candidate = Candidate.of(config, world_size)
        if found := problems(candidate):
            raise PlanError(*found)
        layout, geometry = candidate.layout, candidate.geometry
        rows = config.tokenizer.make_vocab_size_divisible_by * layout.tp
        return cls(
            config=config,
            layout=layout,
            encoder=candidate.encoder,
            geometry=geometry,
            encoder_geometry=candidate.encoder_geometry,
            projector_geometry=candidate.projector_geometry,
            global_batch_size=candidate.global_batch_size,
            num_microbatches=candidate.global_batch_size // (config.train.micro_batch_size * layout.dp),
            train_iters=candidate.train_iters,
            padded_vocab_size=-(-geometry.vocab_size // rows) * rows,
            adapters=candidate.adapters,
        )

    def adapters_in(self, component: str) -> tuple[Adapter, ...]:
        """Those of one component."""
        return tuple(one for one in self.adapters if one.matrix.component == component)

    def trains(self, component: str) -> bool:
        """Whether anything of a component trains, adapters or its own parameters."""
        if self.adapters:
            return bool(self.adapters_in(component))
        return not self.config.model.components[component].freeze

    @property
    def world(self) -> int:
        """All ranks of the job: the foundation's, and those set aside for the encoder."""
        return self.layout.world + self.config.parallel.encoder_ranks

    @property
    def seq_length(self) -> int:
        """Tokens per sequence."""
        return self.config.train.seq_length

    @property
    def micro_batch_size(self) -> int:
        """Sequences per rank and forward pass."""
        return self.config.train.micro_batch_size

    @property
    def layers_per_chunk(self) -> int:
        """Transformer layers of the largest model chunk (a stage, or one of its interleaved parts)."""
        return max(stage_sizes(self.geometry.num_layers, self.layout)) // self.layout.num_chunks

    @property
    def tokens_per_step(self) -> int:
        """Tokens per optimizer step over all ranks."""
        return self.global_batch_size * self.seq_length
