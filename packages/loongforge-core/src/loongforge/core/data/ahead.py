"""Data opened before a run and without one: what it would tokenise and plan on its first start is then in its cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from loongforge.core.checkpoint.start import Start
from loongforge.core.data.contract import SourceRequest
from loongforge.core.data.open import Data, cache_directory, open_data, request_of
from loongforge.core.megatron.groups import World
from loongforge.core.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alone:
    """A world of one process, as far as opening data asks."""

    local_rank: int = 0
    encodes: bool = False
    """Nothing is decoded."""
    is_main: bool = False
    """Nothing is written below --save."""

    def barrier(self) -> None:
        """Nobody else is there."""


def request_ahead(plan: Plan) -> SourceRequest:
    """What the source of a planned run is told about its training data."""
    samples = plan.train_iters * plan.global_batch_size
    return request_of(plan, cast(World, _Alone()), "train", plan.config.data.data_path, samples)


def open_ahead(plan: Plan) -> tuple[Data, list[Path]]:
    """The data of a planned run, and the directories where what was derived from them lies; `DataError` as the run.

    The layout counts: packed segments have lengths that its ranks divide.
    """
    section = plan.config.data
    opened = open_data(plan, cast(World, _Alone()), Start())
    paths = [section.data_path, *([section.valid_data_path] if section.valid_data_path and opened.valid else [])]
    return opened, list(dict.fromkeys(cache_directory(plan, one) for one in paths))
