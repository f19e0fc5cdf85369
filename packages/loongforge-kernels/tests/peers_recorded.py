"""What other projects' functions take, recorded where they are not installed."""

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
