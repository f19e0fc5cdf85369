"""Exact parameter counts of an encoder and its projector."""

from __future__ import annotations

from loongforge.core.model.geometry import EncoderGeometry, ProjectorGeometry
from loongforge.core.plan.parameters import Elements


def encoder_elements(geometry: EncoderGeometry) -> Elements:
    """Patch projection, positions and all layers. The last norm is the projector's."""
    hidden = geometry.hidden_size
    ends = geometry.patch_dim * hidden + geometry.patch_bias * hidden + (geometry.position_embeddings or 0) * hidden
    return Elements(replicated=ends) + _layer(geometry) * geometry.num_layers


def _layer(geometry: EncoderGeometry) -> Elements:
    """Fused QKV and output projection, MLP, two norms. Biases of what is split along its input stay whole."""
    hidden, ffn = geometry.hidden_size, geometry.ffn_hidden_size
    wide = 2 * ffn if geometry.gated else ffn
    matrices = 4 * hidden * hidden + (wide + ffn) * hidden
    split = 3 * hidden + wide if geometry.linear_bias else 0
    whole = 2 * hidden if geometry.linear_bias else 0
    return Elements(split=matrices + split, replicated=whole + 2 * norm_elements(geometry.normalization, hidden))


def projector_elements(geometry: ProjectorGeometry, encoder: EncoderGeometry) -> Elements:
    """A norm and two biased linear layers for the last hidden states and for each deepstack level."""
    assert geometry.input_size is not None, "a plan fills in the sizes"
    assert geometry.output_size is not None, "a plan fills in the sizes"
    merged = geometry.input_size * encoder.spatial_merge_size**2
    mlp = Elements(split=merged * (merged + 1) + merged * geometry.output_size, replicated=geometry.output_size)
    deep = merged if geometry.deepstack_norm_after_merge else geometry.input_size
    norms = norm_elements(geometry.normalization, geometry.input_size)
    norms += encoder.levels * norm_elements(geometry.normalization, deep)
    return mlp * (1 + encoder.levels) + Elements(replicated=norms)


def norm_elements(normalization: str, width: int) -> int:
    """RMSNorm has weights, LayerNorm biases too."""
    return width if normalization == "RMSNorm" else 2 * width


def held(elements: Elements, tp: int) -> int:
    """Parameters of one of `tp` ranks."""
    return elements.split // tp + elements.replicated
