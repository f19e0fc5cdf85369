"""megatron-core's random state tracker over the CPU generator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from loongforge.core.platform.substitution import Substitution


def substitutions() -> tuple[Substitution, ...]:
    """Imports megatron-core, hence a function."""
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher

    why = "the tracker would queue its state for a CUDA generator that never starts: a silent no-op"
    upstream = "tensor_parallel/random.py"
    remove_when = "the tracker takes a generator"
    generator = torch.default_generator

    def get_state(original: Any) -> Any:
        return lambda device="cuda", clone=False, graph_safe=False: generator.get_state()

    def set_state(original: Any) -> Any:
        return lambda state, device=-1, graph_safe=False: generator.set_state(state)

    def to_host(original: Any) -> Any:
        def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
            return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

        return move

    return (
        Substitution(
            owner=random,
            name="_get_cuda_rng_state",
            make=get_state,
            why=why,
            upstream=upstream,
            remove_when=remove_when,
        ),
        Substitution(
            owner=random,
            name="_set_cuda_rng_state",
            make=set_state,
            why=why,
            upstream=upstream,
            remove_when=remove_when,
        ),
        Substitution(
            owner=random,
            name="CudaRNGStatesTracker",
            make=_cpu_tracker,
            upstream=upstream,
            why="upstream's fork warns that the CPU state changed, which is the point here",
            remove_when=remove_when,
        ),
        Substitution(
            owner=token_dispatcher,
            name="maybe_move_tensor_to_cpu",
            make=to_host,
            why="all-to-all split sizes must be host lists; upstream converts only when is_cuda",
            upstream="transformer/moe/token_dispatcher.py",
            remove_when="upstream converts whatever the device",
        ),
    )


def _cpu_tracker(original: type) -> type:
    from megatron.core.tensor_parallel.random import _MODEL_PARALLEL_RNG_TRACKER_NAME

    generator = torch.default_generator

    class CpuRNGStatesTracker(original):
        @contextlib.contextmanager
        def fork(self, name: str = _MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"random state {name!r} was not added; known: {sorted(self.states_)}")
            outer, outer_name = generator.get_state(), self._current_state_name
            if outer_name != "default-rng":
                self.states_[outer_name] = outer
            generator.set_state(self.states_[name])
            self._current_state_name = name
            try:
                yield
            finally:
                self.states_[name] = generator.get_state()
                generator.set_state(self.states_[outer_name] if outer_name != "default-rng" else outer)
                self._current_state_name = outer_name

    return CpuRNGStatesTracker
