"""What one tiny language model of the zoo is, and against what it is proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TP2 = ("--tensor-model-parallel-size", "2")
TP2_SP = (*TP2, "--sequence-parallel")
PP2 = ("--pipeline-model-parallel-size", "2")
VPP2 = (*PP2, "--num-virtual-stages-per-pipeline-rank", "2")
CP2 = ("--context-parallel-size", "2")
EP2 = ("--expert-model-parallel-size", "2")
ETP1 = ("--expert-tensor-parallel-size", "1")

LAYOUTS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "one": ((), 1),
    "tp2": (TP2, 2),
    "tp2-sp": (TP2_SP, 2),
    "pp2": (PP2, 2),
    "pp2-vpp2": (VPP2, 2),
    "cp2": (CP2, 2),
    "ep2": (EP2, 2),
    "tp2-sp-ep2": ((*TP2_SP, *EP2, *ETP1), 2),
    "tp2-sp-pp2": ((*TP2_SP, *PP2), 4),
}
"""Flags and ranks by name."""

DENSE = ("one", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "cp2", "tp2-sp-pp2")
EXPERTS = ("one", "tp2-sp", "pp2", "cp2", "ep2", "tp2-sp-ep2")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny model: all its sizes differ, and everything trainable, norms and biases too, is random."""

    family: str
    config: Mapping[str, Any]
    """`config.json`, spelled as in the releases."""
    layouts: tuple[str, ...]
    """Keys of `LAYOUTS`."""
    write: Callable[[Path, int], None] | None = None
    """`write(directory, seed)` makes the checkpoint in the layout of the hub: `config.json` and safetensors. None:
    transformers' class, randomised, through `save_pretrained`."""
    reference: Callable[[Path], Any] | None = None
    """`reference(directory)` is a module whose call with `input_ids=` answers something with `.logits`, and whose
    parameters carry the checkpoint's names. None: transformers' `AutoModelForCausalLM`."""
    names: Callable[[str], str | None] | None = None
    """The checkpoint's name of a parameter of the reference, where they differ; None drops it."""
    extra_loss: Callable[[Any, Any], Any] | None = None
    """`extra_loss(model, documents)`: a scalar that training adds to the loss besides (multi-token prediction); a
    document is a batch by itself, or part of a packed row."""
    flags: tuple[str, ...] = ()
    """Of every run of this case."""
    rounding: str = r"(?!)"
    """Regular expression of tensors with entries whose gradient is 0 in exact arithmetic: an optimizer that divides by
    the gradient's size moves them by what rounding left, and steps are not compared there."""
    tolerance: float = 2e-5
    """Relative to a tensor's largest entry, fp32."""
    why: str = ""
    """The reason of a tolerance that differs, with the measured number."""
    released: Mapping[str, str] = field(default_factory=dict[str, str])
    """Size of ours to a word about where the full-size figures are from."""
