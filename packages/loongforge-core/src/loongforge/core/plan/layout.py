"""How ranks are arranged: sizes of every axis, from the run's parallel section and the world size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from loongforge.core.config.run import ModelConfig, ParallelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the axes of the foundation. world = tp x cp x dp x pp: its ranks, without those set aside."""

    world: int
    tp: int
    cp: int
    dp: int
    pp: int
    vpp: int | None
    """Model chunks per pipeline stage, None without interleaving."""
    ep: int
    etp: int
    sp: bool
    first_layers: int | None = None
    """Layers of the first pipeline stage, None: as the others have."""
    last_layers: int | None = None
    """Layers of the last pipeline stage, None: as the others have."""

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int) -> Self:
        """The foundation's axes on a job of `world` ranks; dp is rounded down, and at least 1, when it does not fit."""
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        cp, vpp = parallel.context_parallel_size, parallel.virtual_pipeline_model_parallel_size
        own = world - parallel.encoder_ranks
        return cls(
            world=own,
            tp=tp,
            cp=cp,
            dp=max(1, own // (tp * pp * cp)),
            pp=pp,
            vpp=None if vpp == 1 else vpp,
            ep=parallel.expert_model_parallel_size,
            etp=parallel.expert_tensor_parallel_size or tp,
            sp=parallel.sequence_parallel,
            first_layers=parallel.decoder_first_pipeline_num_layers,
            last_layers=parallel.decoder_last_pipeline_num_layers,
        )

    @property
    def expert_dp(self) -> int:
        """Copies of every expert: experts are spread over the ranks of a stage without regard to tp, cp and dp."""
        return max(1, self.world // (self.pp * self.ep * self.etp))

    @property
    def num_chunks(self) -> int:
        """Model chunks of one rank."""
        return self.vpp or 1

    def __str__(self) -> str:
        """`dp2 tp2 pp1 cp1`, with what is not 1."""
        parts = [
            f"{name}{size}"
            for name, size in (
                ("tp", self.tp),
                ("cp", self.cp),
                ("dp", self.dp),
                ("pp", self.pp),
                ("vpp", self.vpp or 1),
                ("ep", self.ep),
            )
            if size > 1
        ]
        return " ".join(parts + ["sp"] * self.sp) or "one rank"


EncoderMode = Literal["inline", "ahead", "apart"]
"""`inline`: inside the forward pass of the first stage. `ahead`: before the pipeline, on all ranks. `apart`: on ranks
of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLayout:
    """Where the encoder and its projector run: `tp x dp` ranks from `offset` on, neighbours share a copy.

    Foundation ranks are numbered tp first, then cp, dp, pp (megatron-core's order). An encoder block of `tp` neighbours
    lies inside one foundation replica's stage, or spans several replicas whole.
    """

    mode: EncoderMode
    tp: int
    dp: int
    offset: int = 0

    @classmethod
    def of(cls, model: ModelConfig, parallel: ParallelConfig, world: int) -> Self | None:
        """Where the encoder of a job of `world` ranks runs, None without one; dp is rounded down, and at least 1.

        Unset, its tensor parallel size is the foundation's, and 1 where whole images are spread over ranks; on ranks of
        its own it makes one copy for each of the foundation's.
        """
        if model.image_encoder is None:
            return None
        mode = encoder_mode(parallel)
        whole = parallel.enable_encoder_hetero_dp or parallel.enable_full_hetero_dp
        shared = 1 if whole else parallel.tensor_model_parallel_size
        if mode == "apart":
            shared = max(1, parallel.encoder_ranks // Layout.of(parallel, world).dp)
        tp = model.image_encoder.parallel.tensor_model_parallel_size or shared
        return cls(mode=mode, tp=tp, dp=max(1, encoder_grid(parallel, world) // tp))

    @property
    def size(self) -> int:
        """Ranks that hold the encoder."""
        return self.tp * self.dp

    def __str__(self) -> str:
        """`ahead tp1 dp4`."""
        return f"{self.mode} tp{self.tp} dp{self.dp}"


def encoder_mode(parallel: ParallelConfig) -> EncoderMode:
    """The mode that the run asks for."""
    if parallel.encoder_ranks:
        return "apart"
    return "ahead" if parallel.enable_full_hetero_dp else "inline"


def encoder_grid(parallel: ParallelConfig, world: int) -> int:
    """Ranks that the encoder may fill in its mode, the first of the job: all, one stage's, or those set aside."""
    mode = encoder_mode(parallel)
    if mode == "apart":
        return parallel.encoder_ranks
    return world if mode == "ahead" else world // parallel.pipeline_model_parallel_size
