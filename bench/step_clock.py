"""How long a step would take with a core for every rank, from the CPU time that each rank used between exchanges.

A rank's log is a list of events: the CPU time of its own thread since the last event, and what it then did with others.
`replay` lets every rank run its pieces on a clock of its own; an exchange sets the clocks of its ranks to the latest of
them. Exchanges themselves take no time: what is measured is who waits for whom, the same on a machine with fewer cores
than ranks and under other load.
"""

from __future__ import annotations

import inspect
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "_all_gather_base", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """One piece of a rank's step, and the exchange it ended with."""

    seconds: float
    """CPU time of the rank's own thread before it."""
    kind: str
    """`together`, `send`, `receive` or `end`."""
    ranks: tuple[int, ...]
    """Who takes part; the other side of a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A step on clocks."""

    length: float
    """Seconds until the last rank is through."""
    busy: tuple[float, ...]
    """Seconds that each rank works."""

    @property
    def idle(self) -> float:
        """Share of the step in which a rank, on average, waits."""
        return 1 - sum(self.busy) / len(self.busy) / self.length

    @property
    def imbalance(self) -> float:
        """The share it could not do better than: the busiest rank never waits."""
        return 1 - sum(self.busy) / len(self.busy) / max(self.busy)


class Recorder:
    """Writes down when this process exchanges something with others. Install before megatron-core is imported."""

    def __init__(self) -> None:
        self._events: list[Event] | None = None
        self._since = 0.0
        self._inside = False

    def install(self) -> None:
        """Put a note in front of torch.distributed's functions, for the life of this process."""
        for name in COLLECTIVES:
            self._replace(name, self._noted(getattr(dist.distributed_c10d, name)))
        for name in ("isend", "send"):
            self._replace(name, self._sending(getattr(dist.distributed_c10d, name)))
        for name in ("irecv", "recv"):
            self._replace(name, self._receiving(getattr(dist.distributed_c10d, name), waits=name == "recv"))

    def start(self) -> None:
        """Begin a log."""
        self._events, self._since = [], time.thread_time()

    def stop(self) -> list[Event]:
        """End the log and return it."""
        events = self._events
        assert events is not None, "start comes first"
        self._note("end", ())
        self._events = None
        return events

    def _note(self, kind: str, ranks: tuple[int, ...]) -> None:
        if self._events is not None:
            now = time.thread_time()
            self._events.append(Event(now - self._since, kind, ranks))
            self._since = now

    def _noted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._events is None or self._inside:
                return function(*args, **kwargs)
            group = signature.bind(*args, **kwargs).arguments.get("group")
            self._note("together", tuple(dist.get_process_group_ranks(group or dist.group.WORLD)))
            return self._unseen(function, args, kwargs)

        call.__name__ = function.__name__
        return call

    def _sending(self, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._events is not None and not self._inside:
                self._note("send", (_other(signature.bind(*args, **kwargs).arguments, "dst"),))
            return self._unseen(function, args, kwargs)

        call.__name__ = function.__name__
        return call

    def _receiving(self, function: Callable[..., Any], *, waits: bool) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._events is None or self._inside:
                return function(*args, **kwargs)
            other = _other(signature.bind(*args, **kwargs).arguments, "src")
            if waits:
                self._note("receive", (other,))
                return self._unseen(function, args, kwargs)
            return _Arriving(self, self._unseen(function, args, kwargs), other)

        call.__name__ = function.__name__
        return call

    def arrived(self, work: Any, other: int) -> Any:
        """Wait for a message, and note that."""
        self._note("receive", (other,))
        return self._unseen(work.wait, (), {})

    def _unseen(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call it; neither its time nor what it calls itself is part of the log."""
        before, self._inside = self._inside, True
        try:
            return function(*args, **kwargs)
        finally:
            self._inside = before
            self._since = time.thread_time()

    @staticmethod
    def _replace(name: str, function: Callable[..., Any]) -> None:
        setattr(dist.distributed_c10d, name, function)
        setattr(dist, name, function)


class _Arriving:
    """The handle of a message that is on its way."""

    def __init__(self, recorder: Recorder, work: Any, other: int) -> None:
        self._recorder, self._work, self._other = recorder, work, other

    def wait(self) -> Any:
        return self._recorder.arrived(self._work, self._other)


def _other(arguments: dict[str, Any], side: str) -> int:
    """Global rank of the other side of a message."""
    peer = arguments.get(side)
    if peer is not None:
        return peer
    group = arguments.get("group") or dist.distributed_c10d._get_default_group()
    return dist.get_global_rank(group, arguments[f"group_{side}"])


def replay(logs: Sequence[Sequence[Event]]) -> Replayed:
    """The step that these logs, one of each rank, describe. Raises `AssertionError` when they do not fit together."""
    clocks, places = [0.0] * len(logs), [0] * len(logs)
    arrived: dict[tuple[tuple[int, ...], int], dict[int, float]] = defaultdict(dict)
    turns: dict[tuple[int, tuple[int, ...]], int] = defaultdict(int)
    messages: dict[tuple[int, int], deque[float]] = defaultdict(deque)
    worked: set[tuple[int, int]] = set()

    def advance(rank: int) -> bool:
        """One event of a rank; False when it has to wait for others, or is through."""
        if places[rank] == len(logs[rank]):
            return False
        event = logs[rank][places[rank]]
        if (rank, places[rank]) not in worked:
            worked.add((rank, places[rank]))
            clocks[rank] += event.seconds
        if event.kind == "together":
            meeting = arrived[event.ranks, turns[rank, event.ranks]]
            meeting[rank] = clocks[rank]
            if len(meeting) < len(event.ranks):
                return False
            turns[rank, event.ranks] += 1
            clocks[rank] = max(meeting.values())
        elif event.kind == "send":
            messages[rank, event.ranks[0]].append(clocks[rank])
        elif event.kind == "receive":
            waiting = messages[event.ranks[0], rank]
            if not waiting:
                return False
            clocks[rank] = max(clocks[rank], waiting.popleft())
        places[rank] += 1
        return True

    while any(advance(rank) for rank in range(len(logs))):
        pass
    stuck = {rank: log[place] for rank, (log, place) in enumerate(zip(logs, places, strict=True)) if place < len(log)}
    assert not stuck, f"an exchange is missing from the log of another rank: {stuck}"
    return Replayed(length=max(clocks), busy=tuple(sum(event.seconds for event in log) for log in logs))


def quickest_pieces(logs: Sequence[Sequence[Event]]) -> list[Event]:
    """The same step of the same rank done several times: of every piece the time it took when least disturbed."""
    pieces = []
    for events in zip(*logs, strict=True):
        assert len({(event.kind, event.ranks) for event in events}) == 1, "the same step exchanges the same"
        pieces.append(min(events, key=lambda event: event.seconds))
    return pieces


def cost_of_waiting(seconds: float) -> float:
    """CPU seconds per second that this process spends in an exchange with ranks that come late. Every rank calls this.

    Rank 0 comes on time, the others after `seconds`.
    """
    tensor = torch.zeros(1)
    dist.all_reduce(tensor)
    if dist.get_rank():
        time.sleep(seconds)
    before = time.process_time()
    dist.all_reduce(tensor)
    return (time.process_time() - before) / seconds
