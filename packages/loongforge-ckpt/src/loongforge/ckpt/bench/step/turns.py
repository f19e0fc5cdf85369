"""The sides take turns: each in a process of its own, one at work while the others wait with nothing on the device."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from loongforge.ckpt.bench.step.case import Case, Facts, Result
from loongforge.ckpt.bench.step.worker import serve

SPOILED = 1 << 30
"""Bytes that a process may keep from a case; one that keeps more begins anew."""


class Side:
    """One side's process, started again when it ends before its time."""

    def __init__(self, name: str, threads: int | None) -> None:
        self.name = name
        self._threads = threads
        self._process: Any = None
        self._pipe: Any = None
        self.facts: Facts | None = None

    def start(self) -> None:
        """Begin to import; `ready` waits for the end of it."""
        here, there = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(there, self.name, self._threads), daemon=True
        )
        self._process.start()
        there.close()
        self._pipe = here
        self.facts = None

    def ready(self) -> Facts:
        """What the process says of itself, once it has imported everything."""
        if self.facts is None:
            try:
                self.facts = self._pipe.recv()
            except EOFError:
                self.facts = Facts(device="", missing=f"its process ended at the start{self._how()}", failed=True)
        assert self.facts is not None, "a process says what is here before anything else"
        return self.facts

    def measure(self, case: Case) -> Result:
        """One case, start to end."""
        here = self.ready()
        if here.missing:
            return Result(side=self.name, case=case.label, reason=here.missing, failed=here.failed)
        try:
            self._pipe.send(case)
            result: Result = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            reason = f"its process ended{self._how()}"
            self.start()
            return Result(side=self.name, case=case.label, reason=reason, failed=True)
        if result.left_bytes > SPOILED:
            self.stop()
            self.start()
        return result

    def product(self, size: int, precision: str) -> float:
        """TFLOP/s of a large matrix product on the device."""
        self._pipe.send((size, precision))
        return self._pipe.recv()

    def stop(self) -> None:
        """End the process."""
        if self._process.is_alive() and self.facts is not None and not self.facts.missing:
            self._pipe.send(None)
            self._process.join(30)
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _how(self) -> str:
        self._process.join(5)
        return f" with exit code {self._process.exitcode}"


@contextmanager
def sides_of(names: Sequence[str], threads: int | None) -> Iterator[Mapping[str, Side]]:
    """The processes, which import side by side; they end with the block."""
    sides = {name: Side(name, threads) for name in names}
    for side in sides.values():
        side.start()
    try:
        for side in sides.values():
            side.ready()
        yield sides
    finally:
        for side in sides.values():
            side.stop()


def rounds(
    case: Case, sides: Mapping[str, Side], count: int, said: Callable[[Result], None]
) -> dict[str, list[Result]]:
    """Every side `count` times, the order turned from round to round; one that could not run is not asked again."""
    found: dict[str, list[Result]] = {name: [] for name in sides}
    for number in range(count):
        for name in sorted(sides, key=list(sides).index, reverse=bool(number % 2)):
            if found[name] and found[name][-1].reason:
                continue
            result = sides[name].measure(case)
            found[name].append(result)
            said(result)
    return found
