"""Random states of a worker, saved and restored exactly on the same layout."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from loongforge.core.megatron.groups import World


def capture(world: World) -> dict[str, Any]:
    """Every generator training may draw from."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker: Any = get_cuda_rng_tracker()
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),  # a checkpoint holds no numpy types
        "torch": torch.get_rng_state(),
        "tracker": tracker.get_states(),
    }
    if world.device.type != "cpu":
        state["device"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any], world: World) -> None:
    """Put the generators back."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    tracker: Any = get_cuda_rng_tracker()
    tracker.set_states(state["tracker"])
    if world.device.type != "cpu" and "device" in state:
        torch.cuda.set_rng_state(state["device"])
