"""What an entry point of the group `loongforge.kernels` loads: plain data, standard library only."""

from __future__ import annotations

from dataclasses import dataclass, replace

API = (1, 0)
"""Version of this contract. Major: breaking. Minor: additions with defaults."""

FLOATS = ("float32", "bfloat16", "float16")
"""What most Triton kernels take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One implementation of one op."""

    op: str
    """Name of the op, whose folder documents the signature every implementation has: `rms_norm`."""
    impl: str
    """Name of this implementation: `triton`."""
    target: str
    """`module:attribute` of the callable; imported on first use."""
    devices: tuple[str, ...] = ()
    """torch device types it runs on; empty means all."""
    dtypes: tuple[str, ...] = ()
    """torch dtype names it accepts, as `bfloat16`; empty means every floating type."""
    capability: str | None = None
    """Least CUDA compute capability, as `sm_90`; None means any."""
    priority: int = 0
    """The highest usable one is chosen; equal ones in the order of their names."""
    requires: tuple[str, ...] = ()
    """Distributions it needs besides torch, as requirement strings: `triton>=3.2`."""
    api: tuple[int, int] = API
    """Contract it was written for."""
    summary: str = ""
    """One line for listings."""


def _torch_paths(op: str, summary: str) -> tuple[KernelSpec, KernelSpec]:
    module = f"loongforge.kernels.{op}"
    return (
        KernelSpec(op=op, impl="reference", target=f"{module}.reference:{op}", summary=f"{summary}: the plain truth"),
        KernelSpec(
            op=op,
            impl="eager",
            target=f"{module}.eager:{op}",
            priority=10,
            summary=f"{summary}: own backward, torch ops",
        ),
    )


def _cpu_paths(op: str, summary: str, how: str) -> tuple[KernelSpec, KernelSpec]:
    """As `_torch_paths`, where the one with its own backward is for CPUs: accelerators have fused kernels."""
    reference, eager = _torch_paths(op, summary)
    return reference, replace(eager, devices=("cpu",), summary=f"{summary}: {how}")


def _triton_path(op: str, summary: str) -> KernelSpec:
    return KernelSpec(
        op=op,
        impl="triton",
        target=f"loongforge.kernels.{op}.triton:{op}",
        devices=("cuda",),
        dtypes=FLOATS,
        priority=20,
        requires=("triton>=3.2",),
        summary=f"{summary}: one kernel each way",
    )


def _library_paths(op: str, summary: str, *dtypes: str, folder: str = "") -> tuple[KernelSpec, KernelSpec]:
    """Of an op defined through `loongforge.kernels.library`: in torch, and as the op itself on a GPU."""
    module = f"loongforge.kernels.{folder or op}"
    return (
        KernelSpec(op=op, impl="reference", target=f"{module}.reference:{op}", summary=f"{summary}: the plain truth"),
        KernelSpec(
            op=op,
            impl="triton",
            target=f"{module}:{op}",
            devices=("cuda",),
            dtypes=dtypes,
            capability="sm_80",
            priority=20,
            requires=("triton>=3.6",),
            summary=summary,
        ),
    )


def _peer_paths(
    impl: str, project: str, versions: str, ops: str, dtypes: tuple[str, ...] = FLOATS
) -> tuple[KernelSpec, ...]:
    """Another project's kernels of `ops`, below every implementation of this wheel: asked for by name or never run."""
    return tuple(
        KernelSpec(
            op=op,
            impl=impl,
            target=f"loongforge.kernels.peers.{impl}:{op}",
            devices=("cuda",),
            dtypes=dtypes,
            priority=-10,
            requires=(f"{project}{versions}", "triton>=3.2"),
            summary=f"{op} of {project.partition('[')[0]}, by name only",
        )
        for op in ops.split()
    )


def _delta_paths(op: str, summary: str) -> tuple[KernelSpec, KernelSpec]:
    """Of a layer with the gated delta rule: in torch, and flash-linear-attention's kernels, chosen where they run."""
    return (
        KernelSpec(op=op, impl="reference", target=f"loongforge.kernels.{op}.reference:{op}", summary=summary),
        KernelSpec(
            op=op,
            impl="fla",
            target=f"loongforge.kernels.peers.fla:{op}",
            devices=("cuda",),
            dtypes=("bfloat16", "float16"),
            priority=20,
            requires=("fla-core>=0.6,<0.7", "triton>=3.3"),
            summary=f"{summary}: kernels of flash-linear-attention",
        ),
    )


def _megatron_path(backend: str, requires: str) -> KernelSpec:
    """`dsa` by a backend of megatron-core's; by name alone too."""
    return KernelSpec(
        op="dsa",
        impl=f"megatron_{backend}",
        target=f"loongforge.kernels.peers.megatron:{backend}_dsa",
        devices=("cuda",),
        dtypes=("bfloat16",),
        capability="sm_90",
        priority=-10,
        requires=("megatron-core>=0.19,<0.20", requires),
        summary=f"sparse attention with its indexer and loss: megatron-core's {backend} kernels, by name only",
    )


_TE = "transformer-engine[pytorch]"

KERNELS: tuple[KernelSpec, ...] = (
    *_torch_paths("rms_norm", "root mean square norm"),
    _triton_path("rms_norm", "root mean square norm"),
    *_torch_paths("swiglu", "silu(gate) * up"),
    _triton_path("swiglu", "silu(gate) * up"),
    *_torch_paths("rope", "rotary position embedding"),
    _triton_path("rope", "rotary position embedding"),
    *_torch_paths("cross_entropy", "loss per token from logits"),
    _triton_path("cross_entropy", "loss per token from logits"),
    *_torch_paths("linear_cross_entropy", "loss per token from hidden states"),
    KernelSpec(
        op="linear_cross_entropy",
        impl="triton",
        target="loongforge.kernels.linear_cross_entropy.triton:linear_cross_entropy",
        devices=("cuda",),
        dtypes=FLOATS,
        capability="sm_80",
        priority=20,
        requires=("triton>=3.2", "torch>=2.11"),
        summary="loss per token from hidden states: one kernel between the products of a block of tokens",
    ),
    *_peer_paths("liger", "liger-kernel", ">=0.8.5,<0.9", "rms_norm swiglu rope cross_entropy linear_cross_entropy"),
    *_peer_paths("fla", "fla-core", ">=0.6,<0.7", "rms_norm swiglu rope cross_entropy"),
    *_peer_paths("te", _TE, ">=2.4,<3", "rms_norm swiglu"),
    *_peer_paths("te", _TE, ">=2.18,<3", "cross_entropy", dtypes=("float32", "bfloat16")),
    *_peer_paths("te", _TE, ">=2.4,<3", "adamw", dtypes=("float32",)),
    *_delta_paths("causal_convolution", "causal convolution of each channel, and silu"),
    *_delta_paths("gated_delta_rule", "linear attention with a gated delta rule"),
    *_cpu_paths("causal_attention", "causal attention", "matrix products of what each block may see, own backward"),
    *_cpu_paths("packed_attention", "attention inside parts of a row", "`causal_attention` for each part"),
    KernelSpec(
        op="packed_attention",
        impl="sdpa",
        target="loongforge.kernels.packed_attention.sdpa:packed_attention",
        priority=5,
        summary="attention inside parts of a row: torch's attention, a call for each part",
    ),
    KernelSpec(
        op="packed_attention",
        impl="varlen",
        target="loongforge.kernels.packed_attention.varlen:packed_attention",
        devices=("cuda",),
        dtypes=("bfloat16", "float16"),
        capability="sm_80",
        priority=20,
        requires=("torch>=2.10",),
        summary="attention inside parts of a row: torch's kernels for many lengths, one launch",
    ),
    KernelSpec(
        op="row_bounds",
        impl="reference",
        target="loongforge.kernels.row_bounds.reference:row_bounds",
        dtypes=("int32", "int64"),
        summary="keys each query may see: torch on every device",
    ),
    *_library_paths("indexer_logits", "index scores of all keys", *FLOATS, "float8_e4m3fn"),
    *_library_paths("select_topk", "keys of the largest scores", "float32"),
    *_library_paths("lightning_indexer", "keys of the largest index scores", *FLOATS),
    *_library_paths("gather_scores", "index scores of chosen keys", *FLOATS),
    *_library_paths("selection_bits", "a selection as a bit mask", "int32"),
    *_library_paths("masked_mha", "attention under a bit mask of keys", "bfloat16", "float16"),
    *_library_paths("sparse_mla", "latent attention over chosen rows", "bfloat16", "float16"),
    *_library_paths("attention_target", "attention per chosen key, over all heads", "bfloat16", "float16"),
    *_library_paths("indexer_kl", "divergence of an indexer from attention", "float32", "bfloat16", "float16"),
    *_library_paths("quantize_1x128", "rows of 128 numbers as fp8 with a scale", *FLOATS, folder="fp8"),
    *_library_paths("quantize_128x128", "squares of 128 numbers as fp8 with a scale", *FLOATS, folder="fp8"),
    *_library_paths("quantize_rowwise", "rows as fp8 with a scale", *FLOATS, folder="fp8"),
    *_library_paths("quantize_tensorwise", "a matrix as fp8 with one scale", *FLOATS, folder="fp8"),
    *_library_paths("hadamard_quant", "rotated rows of 128 numbers as fp8 with a scale", *FLOATS, folder="fp8"),
    *_library_paths("dequantize", "numbers of fp8 blocks with scales", "float8_e4m3fn", folder="fp8"),
    KernelSpec(
        op="dsa",
        impl="composed",
        target="loongforge.kernels.dsa:dsa",
        summary="sparse attention with its indexer and loss: the other ops, by the fastest route",
    ),
    _megatron_path("tilelang", "tilelang"),
    _megatron_path("cudnn", "nvidia-cudnn-frontend>=1.26"),
    *_torch_paths("adamw", "AdamW step"),
    *_torch_paths("grouped_linear", "a matrix for each group of rows"),
    KernelSpec(
        op="grouped_linear",
        impl="grouped_mm",
        target="loongforge.kernels.grouped_linear.grouped_mm:grouped_linear",
        devices=("cuda",),
        dtypes=("bfloat16",),
        capability="sm_80",
        priority=20,
        requires=("torch>=2.10",),
        summary="a matrix for each group of rows: one launch for all where rows are multiples of 16 bytes",
    ),
)
"""What this wheel implements."""
