"""Rules of further layers for multi-token prediction: a decoder layer's under other names, and what is around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

from loongforge.core.model.weights import Copy, LeftOut, Rule
from loongforge.models.parts.decoder_weights import HF_LAYER, LAYER

MOST = 4
"""Further layers of a checkpoint that may be left out; no release has more."""


def block(depth: int, layer: Iterable[Rule], theirs: str) -> Iterator[Rule]:
    """The rules of a decoder layer as those of the one inside a further layer, whose tensors begin with `theirs`."""
    ours = f"mtp.layers.{depth}.mtp_model_layer."
    for rule in layer:
        names: dict[str, Any] = {
            one.name: getattr(rule, one.name).replace(LAYER, ours).replace(HF_LAYER, theirs)
            for one in fields(rule)
            if isinstance(getattr(rule, one.name), str)
        }
        yield replace(rule, **names)


def ends(
    depth: int, *, embedding_norm: str, hidden_norm: str, projection: str, last_norm: str, hidden_first: bool = False
) -> tuple[Rule, ...]:
    """The norms of both inputs, the projection of both together, and the norm in front of the shared output matrix.

    `hidden_first`: the projection's first columns belong to the hidden state, where megatron-core has the embedding.
    """
    ours = f"mtp.layers.{depth}."
    return (
        Copy(megatron=ours + "enorm.weight", hf=embedding_norm),
        Copy(megatron=ours + "hnorm.weight", hf=hidden_norm),
        Copy(megatron=ours + "eh_proj.weight", hf=projection, shard_dim=0, halves_exchanged=hidden_first),
        Copy(megatron=ours + "final_layernorm.weight", hf=last_norm),
    )


def left_out(hf: str, count: int) -> tuple[LeftOut, ...]:
    """What a checkpoint has beyond the `count` further layers that train."""
    remedy = f"--mtp-num-layers {count + 1} trains them" if count else "--mtp-num-layers 1 trains them with the model"
    return (LeftOut(hf=hf, what="multi-token prediction", remedy=remedy),)


class AsLayers:
    """Further layers stored behind the decoder's, as DeepSeek-V3 and GLM-4.5 store them."""

    def __init__(self, num_layers: int, count: int, layer: Iterable[Rule]) -> None:
        """`layer` are the rules of the decoder's last layer."""
        self._first, self._count, self._layer = num_layers, count, tuple(layer)

    def rules(self) -> Iterator[Rule]:
        """Rules of all further layers."""
        for depth in range(self._count):
            theirs = self._prefix(depth)
            yield from ends(
                depth,
                embedding_norm=theirs + "enorm.weight",
                hidden_norm=theirs + "hnorm.weight",
                projection=theirs + "eh_proj.weight",
                last_norm=theirs + "shared_head.norm.weight",
            )
            yield from block(depth, self._layer, theirs)

    def around(self) -> dict[str, Any]:
        """What the table says besides: copies of embedding and head in every further layer, and what is left out."""
        numbers = "|".join(str(self._first + self._count + number) for number in range(MOST))
        return {
            "embedding_again": self._each("embed_tokens.weight"),
            "head_again": self._each("shared_head.head.weight"),
            "left_out": left_out(rf"model\.layers\.({numbers})\..*", self._count),
        }

    def _each(self, name: str) -> tuple[str, ...]:
        return tuple(self._prefix(depth) + name for depth in range(self._count))

    def _prefix(self, depth: int) -> str:
        return f"model.layers.{self._first + depth}."
