"""Names of parameters as they are in one process, whatever the layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def whole_model_name(chunk: torch.nn.Module, name: str) -> str:
    """`name` with numbers of layers and experts in the whole model in place of their numbers on this rank.

    megatron-core counts a chunk's layers from 0 in names; the layer's `layer_number` counts from 1 over all stages. It
    counts the experts of this expert parallel rank from 0 too; every rank of the group holds equally many.
    """
    parts = name.split(".")
    module: Any = chunk
    for position, part in enumerate(parts[:-1]):
        holder, module = module, getattr(module, part)
        if part == "local_experts":
            first = holder.ep_group.rank() * holder.num_local_experts
            parts[position + 1] = str(first + int(parts[position + 1]))
        number = getattr(module, "layer_number", None)
        if part.isdigit() and isinstance(number, int):
            parts[position] = str(number - 1)
    return ".".join(parts)


def whole_model_names(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Parameters of this rank's chunks by whole-model name; the last stage's copy of a tied embedding has its name."""
    found: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks:
        tied = getattr(chunk, "share_embeddings_and_output_weights", False)
        for name, parameter in chunk.named_parameters():
            copied = tied and name == "output_layer.weight"
            found["embedding.word_embeddings.weight" if copied else whole_model_name(chunk, name)] = parameter
    return found
