"""A training step on a GPU that is only imagined: every line of the step's host side runs, no number is computed.

Tensors of the device are fake (`FakeTensorMode`: shapes and dtypes alone); what is on the host is real. Each place
where the host waits for the device, copies to it, launches a Triton kernel or calls an op of ours is written down.

Run as a program, which has a process of its own because all it needs is global: cases as JSON `{name: flags}` on its
standard input, `{name: Record or error}` in the file of its argument. Each case runs in a process forked from this one.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from loongforge.core import env
from loongforge.core.config.resolve import resolve
from loongforge.core.plan import Plan
from loongforge.core.platform import cpu_import, cpu_random, cpu_runtime
from loongforge.core.platform.contract import Memory
from loongforge.core.platform.cuda import CudaPlatform
from loongforge.core.platform.substitution import install
from loongforge.core.testing import run_distributed

NAME = "imagined"
GPU = torch.device("privateuseone", 0)
"""torch's place for a device of somebody else, which `imagine` names. Fake tensors on `cuda` run forward without a GPU,
but autograd has no thread for them."""

aten = torch.ops.aten


@dataclass(kw_only=True)
class Record:
    """What one step asked of the device, with how often. Places are `file function: what`."""

    waits: Counter[str] = field(default_factory=Counter)
    """Where the host waits until the device has done all that it was told: it reads a number, sends a tensor without
    `non_blocking`, which torch's copies wait for, or asks for just that."""
    copies: Counter[str] = field(default_factory=Counter)
    """Where a tensor goes from one to the other and nobody waits."""
    launches: Counter[str] = field(default_factory=Counter)
    """Triton kernels, `module.function`."""
    ops: Counter[str] = field(default_factory=Counter)
    """Ops of `loongforge.kernels` that torch knows."""
    strays: Counter[str] = field(default_factory=Counter)
    """Tensors of the host that reached a kernel, and results of our ops that are not as their fakes say."""


RECORD = Record()


OURS = re.compile(r".*/(loongforge/(?:core|kernels|models)/.*|megatron/core/.*)")
PASSED_OVER = re.compile(r"loongforge/core/(?:testing/|platform/cpu_runtime)|loongforge/kernels/sending")
"""What sends for others, and what stands above every case."""


def place() -> str:
    """The innermost function of ours or of megatron-core's that is at work; the autograd engine has none."""
    for frame in reversed(traceback.extract_stack()):
        if (found := OURS.fullmatch(frame.filename)) and not PASSED_OVER.match(found[1]):
            return f"{found[1]} {frame.name}"
    return "torch"


class Imagination(FakeTensorMode):
    """Fake on the device, real on the host; what goes from one to the other is written down."""

    def __enter__(self) -> Imagination:
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes its tensor on the host, then copies it
        super().__enter__()
        return self

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """As `FakeTensorMode`."""
        kwargs = dict(kwargs or {})
        if func is aten.lift_fresh.default:
            return args[0]
        tensors = list(_tensors((args, kwargs)))
        there = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        target = kwargs.get("device") or (there or tensors or [SimpleNamespace(device="cpu")])[0].device
        to_host = torch.device(target).type == "cpu"
        if not there and to_host:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            _copied("reads", False)
            return _number(there[0].dtype)
        if func is aten._to_copy.default and bool(there) == to_host:
            _copied("reads" if to_host else "sends", kwargs.get("non_blocking", False))
            dtype = kwargs.get("dtype") or args[0].dtype
            if to_host:
                return _numbers(args[0].shape, dtype)
            with self:
                return torch.empty(args[0].shape, dtype=dtype, device=target)
        if func is aten.copy_.default and len(there) == 1:
            _copied("sends" if isinstance(args[0], FakeTensor) else "reads", any(args[2:]))
            return args[0]
        self._look_for_strays(func, tensors)
        if func.namespace == "loongforge":
            return self._kernel(func, args, types)
        return super().dispatch(func, types, args, kwargs)

    def _look_for_strays(self, func: Any, tensors: Sequence[torch.Tensor]) -> None:
        """A tensor without dimensions is a number of the launch; any other goes to the device, or nowhere."""
        if any(tensor.dim() and not isinstance(tensor, FakeTensor) for tensor in tensors):
            RECORD.strays[f"{func} in {place()}"] += 1

    def _kernel(self, func: Any, args: Sequence[Any], types: Sequence[type]) -> Any:
        """What runs on a GPU, in place of the op's fake; they have to agree."""
        RECORD.ops[func._schema.name.partition("::")[2]] += 1
        module, _, function = TARGETS[func].partition(":")
        with self:
            made = getattr(import_module(module), function)(*args)
        told = super().dispatch(func, types, args, {})
        shapes = [[(t.shape, t.dtype, t.device.type) for t in _tensors(some)] for some in (made, told)]
        if shapes[0] != shapes[1]:
            RECORD.strays[f"{func}: {shapes[0]} made, {shapes[1]} told"] += 1
        return made


TARGETS: dict[Any, str] = {}
"""`module:function` that runs an op on a GPU."""


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict | list | tuple):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(part)


def _copied(what: str, non_blocking: bool) -> None:
    (RECORD.copies if non_blocking else RECORD.waits)[f"{place()}: {what}"] += 1


def _number(dtype: torch.dtype) -> Any:
    """What the host reads, wherever it asks."""
    return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1


COUNTS = {"experts": 0, "rows": 0}
"""Whole numbers for every expert add up to these rows: the host cuts tensors by them."""


def _numbers(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    made = torch.full(shape, _number(dtype), dtype=dtype)
    if dtype in (torch.int32, torch.int64) and COUNTS["experts"] and made.numel() == COUNTS["experts"]:
        each, rest = divmod(COUNTS["rows"], COUNTS["experts"])
        made.fill_(each).view(-1)[:rest] += 1
    return made


class Imagined(CudaPlatform):
    """CUDA, answered by the CPU platform's substitutions: megatron-core asks `torch.cuda` for streams and placement."""

    backend = "gloo"

    def activate(self) -> None:
        """As on a CPU, after which the runtime answers as a GPU of compute capability 9.0."""
        for group in cpu_runtime.GROUPS.values():
            install(group)
        cpu_import.import_without_compiler()

    def after_import(self) -> None:
        """The random state of the CPU; what is read of the device comes through `dispatch`."""
        install(cpu_random.substitutions()[:3])

    def device(self, local_rank: int) -> torch.device:
        """The only one."""
        return GPU

    def memory(self) -> Memory:
        """None is used."""
        return Memory(current=0, peak=0)

    def synchronize(self) -> None:
        """Nothing is queued."""

    def device_count(self) -> int:
        """One."""
        return 1


def imagine() -> Imagined:
    """Make the device, for all of this process."""
    _setup_privateuseone_for_python_backend(NAME)  # a device type without code of its own whose tensors autograd takes
    cpu_runtime.CPU = GPU  # what the substitutions answer
    _remember_targets()
    _answer_as_a_gpu()
    platform = Imagined()
    from loongforge.core.megatron.start import preload

    preload(platform)
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    _collect_without_a_group()
    _write_down_launches()
    return platform


def _remember_targets() -> None:
    """Before any op is defined."""
    from loongforge.kernels import library

    define = library.define

    def remember(reference: Any, *, cuda: str, **options: Any) -> Any:
        op = define(reference, cuda=cuda, **options)
        TARGETS[op.overload] = cuda
        return op

    library.define = remember


def _answer_as_a_gpu() -> None:
    """What code asks to choose its way. Without it ours and megatron-core's would take the CPU's."""
    from loongforge.kernels.registry import Registry

    torch.cuda.is_available = lambda: True
    torch.Tensor.is_cuda = property(lambda self: self.device.type == NAME)  # pyright: ignore
    torch.Tensor.cuda = lambda self, *args, **options: self.to(GPU)  # pyright: ignore
    choose, named = Registry.choose, torch.Tensor.type

    def by_cuda(self: Registry, op: str, device: Any, dtype: Any = None, impl: Any = None) -> Any:
        return choose(self, op, str(device).replace(NAME, "cuda"), dtype, impl)

    def of(self: torch.Tensor, dtype: Any = None, *args: Any, **options: Any) -> Any:
        return named(self).replace(NAME, "cuda") if dtype is None else named(self, dtype, *args, **options)

    Registry.choose, torch.Tensor.type = by_cuda, of  # pyright: ignore
    torch.nn.Module._apply = _applied  # pyright: ignore
    FakeTensor.tolist = lambda self: self.cpu().tolist()


def _applied(self: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """As torch's, which makes a parameter that moves to a fake one anew and loses what megatron-core wrote on it."""
    for module in self.modules() if recurse else [self]:
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.nn.Parameter(change(old.detach()), old.requires_grad)
                new.__dict__.update(old.__dict__)
                module._parameters[name] = new
        module._buffers.update({name: change(old) for name, old in module._buffers.items() if old is not None})
    return self


def _collect_without_a_group() -> None:
    """Collectives of one rank: gloo knows no fake tensors."""
    import torch.distributed as dist
    from megatron.core.distributed import param_and_grad_buffer as buffers

    done = SimpleNamespace(wait=lambda *_: True, is_completed=lambda: True)

    def as_it_is(*_: Any, async_op: bool = False, **__: Any) -> Any:
        return done if async_op else None

    def copy(output: torch.Tensor, given: torch.Tensor, *_: Any, async_op: bool = False, **__: Any) -> Any:
        output.copy_(given.reshape(output.shape))
        return done if async_op else None

    def copy_first(outputs: list[torch.Tensor], given: torch.Tensor, *_: Any, **options: Any) -> Any:
        return copy(outputs[0], given, **options)

    @contextlib.contextmanager
    def together(*_: Any, **__: Any) -> Iterator[Any]:
        yield done

    dist.all_gather_object = lambda outputs, given, *_, **__: outputs.__setitem__(0, given)
    dist.all_reduce = dist.broadcast = dist.barrier = as_it_is
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "_all_gather_base", "_reduce_scatter_base"):
        setattr(dist, name, copy)
    dist.all_gather = copy_first
    buffers._coalescing_manager = together
    buffers.dist_all_gather_func = buffers.dist_reduce_scatter_func = copy


def _write_down_launches() -> None:
    """In place of compiling and running: arguments of a kernel have to be on the device. And whole waits."""
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, **options: Any) -> None:
        name = f"{self.fn.__module__}.{self.fn.__name__}"
        RECORD.launches[name.removeprefix("loongforge.kernels.")] += 1
        for given in _tensors((args, options)):
            if not isinstance(given, FakeTensor):
                RECORD.strays[f"{name} is given a tensor on {given.device}"] += 1

    JITFunction.run = run

    def waits(*_: Any, **__: Any) -> None:
        RECORD.waits[f"{place()}: synchronizes"] += 1

    cpu_runtime.Stream.synchronize = cpu_runtime.Event.synchronize = torch.cuda.synchronize = waits


def second_step(plan: Plan, platform: Imagined, worker: env.Worker) -> Record:
    """Of such a run on one rank; what the first step alone does is not in it."""
    from loongforge.core.checkpoint.sources import fresh_components
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.data.open import open_data
    from loongforge.core.megatron.groups import join
    from loongforge.core.model.build import build_model
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training

    config = plan.config
    if (experts := plan.geometry.experts) is not None:
        rows = config.train.seq_length * config.train.micro_batch_size * experts.topk
        COUNTS.update(experts=experts.num_experts, rows=rows)
    with join(plan.layout, worker, platform, 2, plan.encoder) as world:
        start = find_start(config.checkpoint)
        data = open_data(plan, world, start)
        with data.loader(0) as loader:
            batches = [loader.step(), loader.step()]
        with Imagination(allow_non_fake_inputs=True):
            model = build_model(plan, world, fresh=fresh_components(config.model, start))
            training = build_training(plan, world, model)
            train_step(plan, world, training, batches[0], 0)
            for counter in vars(RECORD).values():
                counter.clear()
            train_step(plan, world, training, batches[1], 1)
    return RECORD


def every_way_to_ask(_: env.Worker) -> Record:
    """What a step may do, once each, so that a test sees whether it is written down."""
    with Imagination(allow_non_fake_inputs=True):
        host = torch.arange(3)
        there = host.to(GPU, non_blocking=True)
        torch.tensor([1.0, 2.0], device=GPU)
        there.copy_(host)
        for ask in (float, int, bool, torch.Tensor.item):
            ask(there[0])
        there.tolist()
        there.cpu()
        there.to("cpu", non_blocking=True)
        torch.cuda.current_stream().synchronize()
        there[host]  # an index on the host, which torch sends
    return RECORD


ASKED = "asked"
"""Name of the record of `every_way_to_ask`."""


def _forked(case: Callable[[env.Worker], Record]) -> dict[str, Any] | str:
    try:
        return vars(run_distributed(case, 1)[0])
    except AssertionError as error:
        return str(error)


def main() -> None:
    """All cases of the standard input."""
    warnings.simplefilter("ignore")
    platform = imagine()
    found: dict[str, Any] = {}
    for name, flags in json.load(sys.stdin).items():
        plan = Plan.of(resolve([*flags, "data.source=mock"]), 1)
        found[name] = _forked(functools.partial(second_step, plan, platform))
    found[ASKED] = _forked(every_way_to_ask)
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
