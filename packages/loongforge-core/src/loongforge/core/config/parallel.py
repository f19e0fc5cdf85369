"""How a model, and each of its components, is spread over ranks: the `parallel` section and its like in a component."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loongforge.core.config.bounds import below, refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the model is spread over ranks. Data parallel size follows from the world size."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage; as the others have when unset."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage; as the others have when unset."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule)."""
    context_parallel_size: int = 1
    """Ranks that share every sequence."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of every mixture-of-experts layer."""
    expert_tensor_parallel_size: int | None = None
    """Tensor parallel size inside experts; as tensor_model_parallel_size when unset."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor parallel ranks."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over data parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    overlap_param_gather: bool = False
    """Gather parameters while the forward pass runs; needs the distributed optimizer and overlap_grad_reduce."""
    ddp_bucket_size: int | None = None
    """Elements per gradient bucket; megatron-core's default when unset."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What the backward pass computes again instead of keeping."""
    recompute_method: Literal["uniform", "block"] | None = None
    """How `full` recompute chooses layers."""
    recompute_num_layers: int | None = None
    """Layers per recomputed group (uniform) or recomputed layers per stage (block)."""
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """Modules that `selective` recomputes."""
    enable_encoder_hetero_dp: bool = False
    """The encoder is data parallel over the foundation's tensor and context parallel ranks: its tensor parallel size
    is 1."""
    enable_full_hetero_dp: bool = False
    """The encoder is a task of its own ahead of the pipeline, its images spread over all ranks of TP x CP x PP."""
    full_hetero_dp_cpu_offload: bool = False
    """Keep the features that wait for the pipeline, and their gradients, in host memory on the first stage too."""
    encoder_ranks: int = 0
    """Ranks set aside for the encoder, the first ones; 0 runs it on the foundation's ranks."""

    def __post_init__(self) -> None:
        sizes = [f"{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context", "expert_model")]
        optional = ("virtual_pipeline_model_parallel_size", "expert_tensor_parallel_size", "recompute_num_layers")
        ends = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
        problems = below(1, "parallel", self, *sizes, *optional, *ends, "ddp_bucket_size")
        problems += below(0, "parallel", self, "encoder_ranks")
        refuse(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentParallel:
    """How one component beside the foundation is spread over its ranks; the foundation's fields are the run's own."""

    tensor_model_parallel_size: int | None = None
    """Ranks that share every layer's matrices; as the foundation's when unset."""
    data_parallel_size: int | None = None
    """Copies of the component; follows from its ranks, and is compared when given."""
    context_parallel_size: int | None = None
    """Only 1: an encoder spreads whole images over ranks."""
    pipeline_model_parallel_size: int | None = None
    """Only 1: an encoder has no stages."""
    sequence_parallel: bool | None = None
    """Only false: an encoder's patches are spread by image."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """What the backward pass of this component computes again instead of keeping."""
    recompute_method: Literal["uniform", "block"] | None = None
    """How `full` recompute chooses layers."""
    recompute_num_layers: int | None = None
    """Layers per recomputed group (uniform) or recomputed layers (block)."""
    recompute_modules: tuple[str, ...] | None = None
    """Modules that `selective` recomputes."""

    def __post_init__(self) -> None:
        sizes = [f"{axis}_parallel_size" for axis in ("tensor_model", "data", "context", "pipeline_model")]
        refuse(below(1, "", self, *sizes, "recompute_num_layers"))
