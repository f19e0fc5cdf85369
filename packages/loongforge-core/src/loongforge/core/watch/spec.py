"""Trackers that come with core (`loongforge.trackers`)."""

from __future__ import annotations

from loongforge.core.plugins import Lazy, TrackerSpec

TENSORBOARD = TrackerSpec(
    name="tensorboard",
    api=(1, 0),
    make=Lazy("loongforge.core.watch.trackers:tensorboard"),
    extra="tensorboard",
    summary="TensorBoard event files",
)
WANDB = TrackerSpec(
    name="wandb",
    api=(1, 0),
    make=Lazy("loongforge.core.watch.trackers:wandb"),
    extra="wandb",
    summary="Weights & Biases, online or offline",
)
SWANLAB = TrackerSpec(
    name="swanlab",
    api=(1, 0),
    make=Lazy("loongforge.core.watch.trackers:swanlab"),
    extra="swanlab",
    summary="SwanLab, online or offline",
)
