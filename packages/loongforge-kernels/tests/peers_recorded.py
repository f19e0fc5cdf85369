"""What other projects' functions take, recorded where they are not installed, and what stands in for them in tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

LIGER = {
    ("rms_norm", "LigerRMSNormFunction"): ("X", "W", "eps", "offset", "casting_mode", "in_place"),
    ("swiglu", "LigerFusedGateUpSiLUMulFunction"): ("y", "in_place"),
    ("rope", "rope_forward"): ("q", "k", "cos", "sin", "position_ids", "unsqueeze_dim", "rotary_dim"),
    ("rope", "rope_backward"): ("dq", "dk", "cos", "sin", "position_ids", "unsqueeze_dim", "rotary_dim"),
    ("cross_entropy", "LigerCrossEntropyFunction"): (
        "_input", "target", "weight", "ignore_index", "lse_square_scale", "label_smoothing", "reduction",
    ),
    ("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction"): (
        "_input", "weight", "target", "bias", "ce_weight", "ignore_index", "lse_square_scale", "label_smoothing",
        "reduction", "softcap", "return_z_loss", "accum_dtype",
    ),
}  # fmt: skip
"""liger-kernel 0.8.5: first parameters of its functions, or of the `forward` of its autograd functions."""

FLA = {
    ("modules.norm.layernorm", "rms_norm"): ("x", "weight", "bias", "residual", "eps", "prenorm", "residual_in_fp32"),
    ("modules.activations", "swiglu"): ("x", "y"),
    ("modules.rotary", "rotary_embedding"): ("x", "cos", "sin", "interleaved", "inplace"),
    ("modules.fused_cross_entropy", "cross_entropy_loss"): (
        "logits", "target", "label_smoothing", "logit_scale", "lse_square_scale", "logit_softcapping", "ignore_index",
        "inplace_backward", "process_group",
    ),
    ("modules.causal_conv1d", "causal_conv1d"): (
        "x", "weight", "bias", "residual", "initial_state", "output_final_state", "activation", "backend", "cu_seqlens",
    ),
    ("ops.gated_delta_rule", "chunk_gated_delta_rule"): (
        "q", "k", "v", "g", "beta", "scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel",
        "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "state_v_first", "cu_seqlens",
    ),
}  # fmt: skip
"""fla-core 0.6.0: first parameters of its functions."""

TE = {
    ("transformer_engine_torch", "rmsnorm_fwd"): (
        "input", "weight", "eps", "ln_out", "quantizer", "otype", "sm_margin", "zero_centered_gamma",
    ),
    ("transformer_engine_torch", "rmsnorm_bwd"): ("dz", "x", "rsigma", "gamma", "sm_margin", "zero_centered_gamma"),
    ("transformer_engine_torch", "swiglu"): ("input", "quantizer"),
    ("transformer_engine_torch", "dswiglu"): ("grad", "fwd_input", "quantizer"),
    ("transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy"): (
        "inp", "target", "label_smoothing", "reduce_loss", "dist_process_group", "ignore_idx", "is_cg_capturable",
    ),
    ("transformer_engine.pytorch.optimizers", "multi_tensor_adam"): (
        "chunk_size", "noop_flag", "tensor_lists", "lr", "beta1", "beta2", "epsilon", "step", "mode",
        "bias_correction", "weight_decay",
    ),
}  # fmt: skip
"""TransformerEngine 2.20.2, those of `transformer_engine_torch` as `csrc/extensions` has them, the same in 2.4."""


def stand_in(names: tuple[str, ...], compute: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A function of the recorded parameters; `compute` takes what it was called with, by name."""

    def call(*arguments: Any, **named: Any) -> Any:
        assert set(named) <= set(names), f"{set(named) - set(names)} are no parameters"
        assert len(arguments) <= len(names)
        given = dict(zip(names, arguments, strict=False))
        assert not given.keys() & named.keys()
        return compute(given | named)

    return call


def stand_ins(recorded: Mapping[tuple[str, str], tuple[str, ...]], compute: Mapping[str, Any]) -> Callable[..., Any]:
    """In place of an adapter's `_of(module, name)`: stand-ins with what was recorded of a project."""
    assert compute.keys() == {name for _, name in recorded}

    def of(module: str, name: str) -> Any:
        return stand_in(recorded[module, name], compute[name])

    return of


def truth(op: str) -> Callable[..., Any]:
    """Our reference of an op."""
    return getattr(import_module(f"loongforge.kernels.{op}.reference"), op)
