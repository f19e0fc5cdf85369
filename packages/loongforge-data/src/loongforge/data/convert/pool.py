"""Shards in processes, which say how far they are, or as tasks of an engine."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType

from loongforge.core.errors import DataError
from loongforge.data.convert.shard import ShardRecord, ShardTask, write_shard
from loongforge.data.engine import Engine

_TELL_SECONDS = 0.2
"""Between two messages of a process about its progress."""

Advance = Callable[[int], None]


def write_shards(tasks: Iterable[ShardTask], workers: int, advance: Advance) -> Generator[ShardRecord]:
    """Records in the order the shards are finished. One worker, or none, is this process.

    While every worker has a shard the next one is planned, and no more. `DataError` when a worker ends by force.
    """
    if workers <= 1:
        for task in tasks:
            yield _written(task, advance)
        return
    with _Pool(workers, advance) as pool:
        for task in tasks:
            while not pool.accepts():
                yield from pool.answers()
            pool.give(task)
        while pool.is_busy():
            yield from pool.answers()


def write_on(engine: Engine, tasks: Iterable[ShardTask], advance: Advance) -> Generator[ShardRecord]:
    """As `write_shards`, with a task of the engine for each shard; progress is told by whole shards."""
    sizes: deque[int] = deque()

    def measured() -> Iterator[ShardTask]:
        for task in tasks:
            sizes.append(sum(sample.read for sample in task.samples))
            yield replace(task, folder=task.folder.absolute())  # a task has another working directory

    for record in engine.map(_writer, (), measured()):
        advance(sizes.popleft())
        yield record


def _writer() -> Callable[[ShardTask], ShardRecord]:
    return lambda task: _written(task, lambda size: None)


def _written(task: ShardTask, advance: Advance) -> ShardRecord:
    try:
        return write_shard(task, advance)
    except OSError as error:
        raise DataError(
            f"cannot write {task.folder / task.name}: {error.strerror or error}. The same command goes on from the "
            "finished shards."
        ) from error


class _Pool:
    """Processes that are started when there is work for them."""

    def __init__(self, workers: int, advance: Advance) -> None:
        self._workers, self._advance = workers, advance
        self._context = multiprocessing.get_context("spawn")  # no thread or lock of this process is copied
        self._processes: dict[Connection, BaseProcess] = {}
        self._idle: list[Connection] = []

    def __enter__(self) -> _Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for connection, process in self._processes.items():
            if kind is not None:
                process.terminate()
            connection.close()  # a worker that reads from a closed end is done
        for process in self._processes.values():
            process.join()

    def accepts(self) -> bool:
        """Whether a worker is idle or not started yet."""
        return bool(self._idle) or len(self._processes) < self._workers

    def is_busy(self) -> bool:
        """Whether some shard is being written."""
        return len(self._idle) < len(self._processes)

    def give(self, task: ShardTask) -> None:
        """Hand a task to an idle worker, or to a new one."""
        if self._idle:
            connection = self._idle.pop()
        else:
            connection, other = self._context.Pipe()
            process = self._context.Process(target=_serve, args=(other,), daemon=True)
            process.start()
            other.close()
            self._processes[connection] = process
        try:
            connection.send(task)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._ended() from error

    def answers(self) -> Iterator[ShardRecord]:
        """Wait for messages; progress is passed on, records are yielded."""
        busy = [connection for connection in self._processes if connection not in self._idle]
        for connection in wait(busy):
            assert isinstance(connection, Connection), "only those were waited for"
            try:
                said = connection.recv()
            except (EOFError, ConnectionResetError) as error:
                raise self._ended() from error
            if isinstance(said, int):
                self._advance(said)
            elif isinstance(said, ShardRecord):
                self._idle.append(connection)
                yield said
            else:
                raise DataError(*said)

    def _ended(self) -> DataError:
        return DataError(
            f"one of {self._workers} converting processes ended by force, perhaps for lack of memory; the same command "
            "goes on from the finished shards."
        )


def _serve(connection: Connection) -> None:
    """A worker: tasks come, progress and records go, until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the first process ends the others
    done, told = 0, time.monotonic()

    def advance(size: int) -> None:
        nonlocal done, told
        done += size
        if time.monotonic() - told >= _TELL_SECONDS:
            connection.send(done)
            done, told = 0, time.monotonic()

    try:
        while True:
            task = connection.recv()
            try:
                record = _written(task, advance)
            except DataError as error:
                connection.send(error.problems)
                continue
            connection.send(done)
            done = 0
            connection.send(record)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody is there any more
        return
