"""Bytes of files at any place, without opening a file for every read."""

from __future__ import annotations

import os
from collections import OrderedDict

_OPEN = 64
"""Files that one reader keeps open; a process may have 1024 on most systems, and every loader worker reads."""


class Files:
    """Opens a file at its first read and keeps it open; beyond `most` the least recently used one is closed.

    Reads carry their own offset, so that a copy in a forked process is independent.
    """

    def __init__(self, most: int = _OPEN) -> None:
        assert most > 0, "at least the file that is read is open"
        self._most = most
        self._open: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer where the file ends; `OSError` as `open` raises it."""
        descriptor = self._descriptor(path)
        content = os.pread(descriptor, size, offset)
        if len(content) == size:
            return content
        parts = [content]  # Linux reads at most 2 GiB at once
        while parts[-1] and (done := sum(map(len, parts))) < size:
            parts.append(os.pread(descriptor, size - done, offset + done))
        return b"".join(parts)

    def close(self) -> None:
        """Close all; the next read opens again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __len__(self) -> int:
        """Files that are open."""
        return len(self._open)

    def __del__(self) -> None:
        self.close()

    def _descriptor(self, path: str) -> int:
        found = self._open.get(path)
        if found is not None:
            self._open.move_to_end(path)
            return found
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[path] = descriptor
        if len(self._open) > self._most:
            os.close(self._open.popitem(last=False)[1])
        return descriptor
