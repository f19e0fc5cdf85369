"""Cases with further layers for multi-token prediction."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from case import Case

SCALE = 0.3
"""Factor of the further layers' loss, other than any default."""


def predicting(
    layout: str,
    *,
    family: str,
    config: Mapping[str, Any],
    layouts: tuple[str, ...],
    flags: tuple[str, ...] = (),
    depths: int = 1,
    **more: Any,
) -> Case:
    """A case whose checkpoint is named as `layout` of `prediction` says, all further layers trained."""
    asked = ("--mtp-num-layers", str(depths), "--mtp-loss-scaling-factor", str(SCALE))

    def call(name: str, *arguments: Any) -> Any:
        import prediction  # imports torch

        return getattr(prediction, name)(config, depths, getattr(prediction, layout), *arguments)

    def extra_loss(model: Any, documents: Any) -> Any:
        return SCALE * sum(model.further_losses(documents)) / depths

    return Case(
        family=family, config=config, layouts=layouts, flags=(*flags, *asked), write=partial(call, "write"),
        reference=partial(call, "reference"), extra_loss=extra_loss, **more,
    )  # fmt: skip
