"""Token files under way: what a killed run has written is kept, and the same run started again goes on behind it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from loongforge.core.errors import DataError
from loongforge.data.indexed import write_index

_STATE = "state.json"


class Draft:
    """The folder `PREFIX.partial` with tokens and lengths of one or more token files, and how far they are.

    `signature` says what is written: a draft of something else is thrown away. `DataError` when another process writes
    here, or the disk does not let this one.
    """

    def __init__(self, prefix: str, count: int, dtype: np.dtype, signature: str) -> None:
        self._folder = Path(f"{prefix}.partial")
        self._dtype = dtype
        self._signature = signature
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
            self._state = self._found(count)
            self._streams = [
                [self._opened(f"tokens-{number}.bin", tokens), self._opened(f"lengths-{number}.bin", lengths)]
                for number, (tokens, lengths) in enumerate(self._state["sizes"])
            ]
        except OSError as error:
            raise self._failed(error) from error

    @property
    def parts(self) -> int:
        """Parts that are written."""
        return self._state["parts"]

    @property
    def place(self) -> dict[str, Any]:
        """What was noted with the last part."""
        return self._state["place"]

    def add(self, tokens: Sequence[np.ndarray], lengths: Sequence[np.ndarray], place: dict[str, Any]) -> None:
        """Write one more part, for each file tokens and lengths of its documents, and note `place` with it."""
        try:
            for streams, arrays in zip(self._streams, zip(tokens, lengths, strict=True), strict=True):
                for stream, array in zip(streams, arrays, strict=True):
                    stream.write(array.tobytes())
                    stream.flush()
            sizes = [[stream.tell() for stream in streams] for streams in self._streams]
            self._state = {**self._state, "parts": self.parts + 1, "sizes": sizes, "place": place}
            self._note()
        except OSError as error:
            raise self._failed(error) from error

    def lengths(self, number: int) -> np.ndarray:
        """Of the documents in file `number`, int32."""
        return np.fromfile(self._folder / f"lengths-{number}.bin", dtype="<i4")

    def publish(self, number: int, targets: Sequence[tuple[str, int, int]]) -> None:
        """Move file `number` to where it belongs: for each prefix the documents `first` to `last - 1`."""
        lengths = self.lengths(number)
        borders = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]) * self._dtype.itemsize
        whole = self._folder / f"tokens-{number}.bin"
        try:
            for prefix, first, last in targets:
                tokens, index = self._folder / "target.bin", self._folder / "target.idx"
                write_index(index, lengths[first:last], self._dtype)
                if len(targets) == 1:
                    tokens = whole
                else:
                    _copy(whole, tokens, int(borders[first]), int(borders[last]))
                Path(f"{prefix}.idx").unlink(missing_ok=True)  # no index beside tokens of another time
                os.replace(tokens, f"{prefix}.bin")
                os.replace(index, f"{prefix}.idx")
        except OSError as error:
            raise self._failed(error) from error

    def discard(self) -> None:
        """Leave nothing behind."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Leave the draft to whoever goes on."""
        for streams in self._streams:
            for stream in streams:
                stream.close()
        self._lock.close()

    def _locked(self) -> IO[bytes]:
        lock = open(self._folder / "lock", "ab")  # noqa: SIM115  held until the draft is closed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise DataError(
                f"another process is writing {self._folder}: wait for it, or choose another --output."
            ) from None
        return lock

    def _found(self, count: int) -> dict[str, Any]:
        """The state of an earlier run when it wrote the same, else of a new one."""
        fresh = {"signature": self._signature, "parts": 0, "sizes": [[0, 0]] * count, "place": {}}
        try:
            state = json.loads((self._folder / _STATE).read_text())
            names = [f"{kind}-{number}.bin" for number in range(count) for kind in ("tokens", "lengths")]
            sizes = [size for pair in state["sizes"] for size in pair]
            whole = all(os.path.getsize(self._folder / name) >= size for name, size in zip(names, sizes, strict=True))
        except (OSError, ValueError, KeyError, TypeError):
            return fresh
        return state if whole and state.get("signature") == self._signature else fresh

    def _opened(self, name: str, size: int) -> IO[bytes]:
        stream = open(self._folder / name, "ab")  # noqa: SIM115  closed by `close`
        stream.truncate(size)
        stream.seek(size)
        return stream

    def _note(self) -> None:
        draft = self._folder / f"{_STATE}.new"
        draft.write_text(json.dumps(self._state))
        os.replace(draft, self._folder / _STATE)

    def _failed(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write {self._folder}: {error.strerror or error}. What is written there is used again."
        )


def _copy(source: Path, target: Path, first: int, last: int) -> None:
    with open(source, "rb") as read, open(target, "wb") as write:
        read.seek(first)
        while first < last and (content := read.read(min(1 << 24, last - first))):
            write.write(content)
            first += len(content)
