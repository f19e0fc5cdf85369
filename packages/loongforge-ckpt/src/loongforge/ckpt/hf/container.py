"""Write one safetensors file tensor by tensor, so that no file is ever whole in memory.

The format: eight bytes with the length of the header, the header as JSON (type, shape and byte range of every tensor),
then the raw bytes of all tensors without gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import torch

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One tensor of a file before its numbers are known."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of the raw numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ContainerWriter:
    """A safetensors file whose tensors arrive one after the other, in the order announced; a context manager.

    Every method may raise `OSError`. Leaving the context without an error has put the file on the disk.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._path, self._expected = path, list(reversed(entries))
        self._header = header(entries)
        self._file: BinaryIO | None = None
        self._rows = 0

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        self._file.write(self._header)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, on the CPU, of the announced type and shape; or the next rows of it."""
        entry, shape = self._expected[-1], tuple(tensor.shape)
        assert (name, tensor.dtype, shape[1:]) == (entry.name, entry.dtype, entry.shape[1:]), (
            f"{entry} was announced, {name} {tensor.dtype} {shape} came"
        )
        rows, whole = self._rows + (shape[0] if shape else 1), entry.shape[0] if entry.shape else 1
        assert rows <= whole, f"{entry} was announced, {name} has {rows} rows"
        self._rows = rows % whole if whole else 0
        if rows == whole:
            self._expected.pop()
        assert self._file is not None, "write inside the context"
        self._file.write(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))

    def __exit__(self, kind: object, *_: object) -> None:
        assert self._file is not None, "leave the context once"
        with self._file:
            if kind is None:
                assert not self._expected, f"{self._expected[-1].name} was announced and did not come"
                self._file.flush()
                os.fsync(self._file.fileno())


def header(entries: Sequence[Entry]) -> bytes:
    """Length and JSON of the header, padded with blanks so that the first tensor begins at a multiple of 8 bytes."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        fields[entry.name] = {
            "dtype": TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.bytes],
        }
        position += entry.bytes
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
