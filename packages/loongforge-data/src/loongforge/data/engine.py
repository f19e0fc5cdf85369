"""Where prepared work runs: in processes of this machine, or on a Ray cluster; the answers are the same."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from loongforge.core.errors import DataError
from loongforge.data.tokenise import call_made, in_order

INSTALL = "pip install 'loongforge-data[ray]'"
ENGINES = ("local", "ray")
_AHEAD = 4
"""Items under way for each worker: enough that none waits while an earlier answer is written."""


class Engine(Protocol):
    """Runs one function over many items."""

    def map[In, Out](
        self, make: Callable[..., Callable[[In], Out]], arguments: tuple[Any, ...], work: Iterable[In]
    ) -> Iterator[Out]:
        """`make(*arguments)(item)` for every item of `work`, answers in the order of the items.

        `make` is a function or class of an importable module, called once in every worker; arguments are hashable.
        Arguments, items and answers are pickled. A bounded number of items is under way, so that `work` may be longer
        than memory. What a worker raises is raised here.
        """
        ...

    @property
    def threads(self) -> bool:
        """Whether work runs in the calling process alone, so that it may use threads of its own."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Processes of this machine; none when `workers` is 0."""

    workers: int = 0

    @property
    def threads(self) -> bool:
        """Nothing runs beside this process."""
        return self.workers == 0

    def map[In, Out](
        self, make: Callable[..., Callable[[In], Out]], arguments: tuple[Any, ...], work: Iterable[In]
    ) -> Iterator[Out]:
        """As `Engine.map`."""
        return in_order(make, arguments, work, self.workers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ray:
    """Tasks of a Ray cluster: the one that `RAY_ADDRESS` names or this machine belongs to, else one made here.

    Every node has this package, and sees the files that items name under the same paths.
    """

    workers: int = 0
    """Tasks under way at a time; 0: one for every CPU of the cluster."""

    @property
    def threads(self) -> bool:
        """Tasks have one CPU each."""
        return False

    def map[In, Out](
        self, make: Callable[..., Callable[[In], Out]], arguments: tuple[Any, ...], work: Iterable[In]
    ) -> Iterator[Out]:
        """As `Engine.map`."""
        ray = _ray()
        started = not ray.is_initialized()
        if started:
            ray.init(log_to_driver=False, include_dashboard=False)
        try:
            most = _AHEAD * (self.workers or max(1, int(ray.cluster_resources().get("CPU", 1))))
            task = ray.remote(max_retries=3)(call_made)
            pending: deque[Any] = deque()
            for item in work:
                pending.append(task.remote(make, arguments, item))
                if len(pending) >= most:
                    yield _answer(ray, pending.popleft())
            while pending:
                yield _answer(ray, pending.popleft())
        finally:
            if started:
                ray.shutdown()


def open_engine(name: str, workers: int) -> Engine:
    """The engine called `local` or `ray`; `DataError` when it is not installed or `workers` is negative."""
    if workers < 0:
        raise DataError(f"--workers must be 0 or more, got {workers}.")
    if name == "ray":
        _ray()
        return Ray(workers=workers)
    assert name == "local", f"unknown engine {name!r}"
    return Local(workers=workers)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """`--engine` and `--workers`, for a command that prepares data."""
    parser.add_argument("--engine", choices=ENGINES, default="local", help="processes here (default), or a Ray cluster")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes, or tasks at a time (default 0: threads of this process; with ray every CPU of the cluster)",
    )


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise DataError(f"--engine ray needs Ray: {INSTALL}") from error


def _answer(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise DataError(f"a task on the Ray cluster was lost for good: {error}") from error
