"""Derived files are built by one process while the others wait, and appear whole or not at all."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from loongforge.core.errors import DataError


def build_once(target: Path, build: Callable[[], None], *, is_builder: bool, barrier: Callable[[], object]) -> None:
    """Make `target` exist: one builder calls `build`, everyone returns when it is there. Collective.

    Waiting is done on a file lock, not at the barrier, because tokenising may take longer than a collective may wait;
    the lock falls when its holder ends, however it ends. Several builders (one per node, or two runs) may share a
    directory. `build` must create `target` by a rename. `DataError` when the builder failed or the directory is not
    writable.
    """
    if is_builder and not target.exists():
        _make_folder(target.parent)
        with locked(target, wait=False) as held:
            barrier()
            if held and not target.exists():
                build()
        with locked(target, wait=True):
            if not target.exists():
                build()
    else:
        barrier()
        if not target.exists():
            with locked(target, wait=True):
                pass
    if not target.exists():
        raise DataError(f"{target} was not built: the message of the process that builds it says why.")
    barrier()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(folder, error) from error


@contextmanager
def locked(target: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock beside `target`; yields False when it is taken and `wait` is not asked for."""
    path = target.with_name(target.name + ".lock")
    try:
        stream: IO[bytes] = open(path, "ab")  # noqa: SIM115  closed below; the lock lives as long as it is open
    except OSError as error:
        raise _cannot_write(path, error) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise DataError(
                f"cannot lock {path}: {error}. Put the cache on a file system with locks: --data-cache-path DIR."
            ) from error
        yield True


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot write {path}: {error.strerror or error}. Give a writable --data-cache-path DIR.")
