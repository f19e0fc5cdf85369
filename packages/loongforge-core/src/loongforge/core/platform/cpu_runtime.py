"""The CUDA runtime calls that megatron-core makes unconditionally, answered for a CPU.

Upstream for all of them: megatron-core 0.19 names `"cuda"` and `torch.cuda.*` literally instead of asking a device
abstraction. They take effect only in a process whose platform is `cpu`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.jit import _builtins as jit_builtins

from loongforge.core import env
from loongforge.core.platform.substitution import Substitution

CPU = torch.device("cpu")
FACTORIES = [
    "tensor",
    "as_tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
    "empty_strided",
    "tril_indices",
]
TENSOR_FACTORIES = ("new_empty", "new_zeros", "new_ones", "new_tensor", "new_full")


class Stream:
    """A stream on a device whose work is already in order."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device, self.priority, self.cuda_stream = CPU, priority, 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """One priority."""
        return (0, 0)

    def wait_stream(self, stream: Any) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Nothing to wait for."""

    def record_event(self, event: Any = None) -> Event:
        """An event that has happened."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Nothing is queued."""

    def query(self) -> bool:
        """Everything is done."""
        return True

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class Event:
    """A moment on the host clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.moment = 0.0

    def record(self, stream: Any = None) -> None:
        """Take the time."""
        self.moment = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """It has happened."""
        return True

    def synchronize(self) -> None:
        """It has happened."""

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds from this event to the other."""
        return (other.moment - self.moment) * 1e3


def _names_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)  # a bare ordinal is a CUDA device


def _factory(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return original(*args, **kwargs)

    builtin = jit_builtins._find_builtin(original)
    if builtin:  # else torch.jit.script of a user of this factory fails
        jit_builtins._register_builtin(on_cpu, builtin)
    return on_cpu


def _tensor_to(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], torch.dtype | torch.Tensor) and _names_cuda(args[0]):
            args = (CPU, *args[1:])
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        name = original(self)
        return name.replace("torch.", "torch.cuda.", 1) if self.device.type == "cpu" else name

    return type_


def _answer(function: Callable[..., Any]) -> Callable[[Any], Callable[..., Any]]:
    return lambda original: lambda *args, **kwargs: function(*args, **kwargs)


def _on_gloo(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def make(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("backend") == "nccl":
            kwargs["backend"] = "gloo"
        return original(*args, **kwargs)

    return make


_STREAM = Stream()
_DEFAULT = torch.default_generator


def _device_count() -> int:
    worker = env.worker()
    return worker.local_world_size if worker else 1


def _properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(name="cpu", major=0, minor=0, total_memory=0, multi_processor_count=1)


def _same(owner: Any, why: str, upstream: str, remove_when: str, answers: dict[str, Any]) -> tuple[Substitution, ...]:
    return tuple(
        Substitution(owner=owner, name=name, make=make, why=why, upstream=upstream, remove_when=remove_when)
        for name, make in answers.items()
    )


_LITERAL = "megatron-core asks for a device abstraction instead of naming cuda"

GROUPS: dict[str, tuple[Substitution, ...]] = {
    "placement": _same(
        torch.cuda,
        "tensors and modules are placed on the current device",
        "tensor_parallel/layers.py, models/common/embeddings/rotary_pos_embedding.py, pipeline_parallel/schedules.py",
        _LITERAL,
        {
            "current_device": _answer(lambda: CPU),
            "device_count": _answer(_device_count),
            "set_device": _answer(lambda device: None),
            "device": _answer(lambda device=None: contextlib.nullcontext()),
            "get_device_capability": _answer(lambda device=None: (0, 0)),
            "get_device_properties": _answer(_properties),
            "get_device_name": _answer(lambda device=None: "cpu"),
        },
    ),
    "factories": _same(
        torch,
        'factories are called with device="cuda" or pin_memory=True',
        "distributed/param_and_grad_buffer.py, pipeline_parallel/p2p_communication.py, rope_utils.py",
        _LITERAL,
        dict.fromkeys(FACTORIES, _factory),
    ),
    "tensor": _same(
        torch.Tensor,
        'tensors are moved to "cuda" or made there; pinned copies and stream records mean nothing',
        "optimizer/optimizer.py, optimizer/distrib_optimizer.py, pipeline_parallel/schedules.py",
        _LITERAL,
        {
            **dict.fromkeys(TENSOR_FACTORIES, _factory),
            "to": _tensor_to,
            "cuda": _answer(lambda self, *args, **kwargs: self),
            "pin_memory": _answer(lambda self, *args, **kwargs: self),
            "record_stream": _answer(lambda self, stream: None),
        },
    ),
    "type": (
        Substitution(
            owner=torch.Tensor,
            name="type",
            make=_tensor_type,
            why="parameters are sorted by comparing param.type() with 'torch.cuda.FloatTensor'",
            upstream="optimizer/clip_grads.py, optimizer/optimizer.py, optimizer/distrib_optimizer.py",
            remove_when="megatron-core compares dtypes",
        ),
    ),
    "streams": _same(
        torch.cuda,
        "CPU work is in order, so streams and events have nothing to do",
        "distributed/distributed_data_parallel.py, pipeline_parallel/p2p_communication.py",
        _LITERAL,
        {
            "Stream": lambda original: type("Stream", (Stream,), {}),
            "Event": lambda original: type("Event", (Event,), {}),
            "current_stream": _answer(lambda device=None: _STREAM),
            "default_stream": _answer(lambda device=None: _STREAM),
            "set_stream": _answer(lambda stream: None),
            "stream": _answer(lambda stream: contextlib.nullcontext(stream)),
            "synchronize": _answer(lambda device=None: None),
            "is_current_stream_capturing": _answer(lambda: False),
        },
    ),
    "random": _same(
        torch.cuda,
        "the random state of the device is the CPU generator's",
        "tensor_parallel/random.py",
        _LITERAL,
        {
            "manual_seed": _answer(lambda seed: _DEFAULT.manual_seed(seed)),
            "get_rng_state": _answer(lambda device=None: _DEFAULT.get_state()),
            "set_rng_state": _answer(lambda state, device=None: _DEFAULT.set_state(state)),
        },
    ),
    "backend": _same(
        torch.distributed,
        'groups are made with backend="nccl"',
        "pipeline_parallel/bridge_communicator.py",
        "megatron-core takes the backend that the job was started with",
        {"new_group": _on_gloo, "new_subgroups_by_enumeration": _on_gloo},
    ),
}
"""What `CpuPlatform.activate` installs. Each group has a test that a train step still fails without it."""
