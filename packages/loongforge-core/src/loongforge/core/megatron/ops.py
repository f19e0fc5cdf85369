"""Which implementation of each small op runs on this platform, chosen by the kernel registry and said once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from loongforge.core import plugins
from loongforge.core.platform import Platform

if TYPE_CHECKING:
    from loongforge.kernels.registry import Registry


def kernels() -> Registry:
    """The implementations that are installed; what LOONGFORGE_PLUGINS has switched off offers none."""
    from loongforge.kernels.registry import Registry

    used = {plugin.distribution for rivals in plugins.registered("kernels").values() for plugin in rivals}
    return Registry.installed(owners=used)


@dataclass(frozen=True, kw_only=True)
class Ops:
    """The ops our layers call; signatures as documented in `loongforge.kernels`."""

    rms_norm: Callable[..., torch.Tensor]
    swiglu: Callable[..., torch.Tensor]
    linear_cross_entropy: Callable[..., torch.Tensor]
    causal_attention: Callable[..., torch.Tensor] | None
    """None where torch's own attention is used: on accelerators, which have fused kernels."""
    packed_attention: Callable[..., torch.Tensor]
    segment_attention: Callable[..., torch.Tensor] | None
    """`packed_attention` for an encoder's frames where it is one launch; None where it goes from part to part: parts of
    one length are better called together."""
    lines: dict[str, str]
    """What was chosen for each and why."""


BY_PART = ("reference", "sdpa", "eager")
"""Implementations of `packed_attention` that go from part to part."""


def ops_for(platform: Platform, dtype: torch.dtype) -> Ops:
    """The best implementation of each op that runs here."""
    registry = kernels()
    device = torch.device(platform.device_type)
    # `repairs` puts rope where megatron-core calls it
    names = ["rms_norm", "swiglu", "rope", "linear_cross_entropy", "packed_attention"]
    names += ["causal_attention"] if device.type == "cpu" else []
    chosen = {name: registry.choose(name, device=device, dtype=dtype) for name in names}
    calls: dict[str, Any] = {name: choice.call for name, choice in chosen.items()}
    return Ops(
        rms_norm=calls["rms_norm"],
        swiglu=calls["swiglu"],
        linear_cross_entropy=calls["linear_cross_entropy"],
        causal_attention=calls.get("causal_attention"),
        packed_attention=calls["packed_attention"],
        segment_attention=None if chosen["packed_attention"].spec.impl in BY_PART else calls["packed_attention"],
        lines={name: choice.line() for name, choice in chosen.items()},
    )
