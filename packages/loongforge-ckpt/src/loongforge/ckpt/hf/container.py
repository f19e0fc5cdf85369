"""Write one safetensors file tensor by tensor, or by several ranks at once; no file is ever whole in memory.

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

import numpy as np
import torch

BUFFER = 2**24
"""Bytes of a tensor that are in memory besides it, where it has another type, order or device than the file."""
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


def create(path: Path, entries: Sequence[Entry]) -> None:
    """A file with its header and its size, whose tensors `ContainerPart` fills in. May raise `OSError`."""
    begin = header(entries)
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(len(begin) + sum(entry.bytes for entry in entries))


class ContainerPart:
    """What one of several ranks writes into a file that was created; a context manager.

    Ranks write at the same time, each its own blocks. Every method may raise `OSError`. Leaving the context without an
    error has put the blocks on the disk.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._path, self._descriptor = path, -1
        self.written = 0
        """Bytes so far."""
        self._places: dict[str, tuple[Entry, int]] = {}
        position = len(header(entries))
        for entry in entries:
            self._places[entry.name] = entry, position
            position += entry.bytes

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._path, os.O_WRONLY)
        return self

    def write(self, name: str, block: Sequence[slice], values: torch.Tensor) -> None:
        """The block of a tensor where `block` says, of any type and on any device; dimensions behind are whole."""
        entry, begin = self._places[name]
        behind = [slice(None)] * (len(entry.shape) - len(block))
        bounds = [part.indices(size)[:2] for part, size in zip([*block, *behind], entry.shape, strict=True)]
        sizes = [stop - start for start, stop in bounds]
        assert list(values.shape) == sizes, f"a block {sizes} of {entry} was announced, {list(values.shape)} came"
        if not values.numel():
            return
        lines = values.flatten(0, -2) if values.dim() > 1 else values.reshape(1, -1)
        width = lines.size(1) * entry.dtype.itemsize
        first = next((dim for dim, size in enumerate(sizes) if size > 1), 0)
        one_stretch = sizes[first + 1 :] == list(entry.shape[first + 1 :])
        step = max(1, BUFFER // width)
        for at in range(0, len(lines), step):
            some = lines[at : at + step].to(device="cpu", dtype=entry.dtype).contiguous()
            raw = memoryview(some.view(-1).view(torch.uint8).numpy())
            places = begin + entry.dtype.itemsize * _line_places(
                bounds, entry.shape, at, 1 if one_stretch else len(some)
            )
            for number, place in enumerate(places.tolist()):
                self._put(raw if one_stretch else raw[number * width : (number + 1) * width], place)

    def _put(self, raw: memoryview, place: int) -> None:
        self.written += len(raw)
        while raw:
            count = os.pwrite(self._descriptor, raw, place)
            raw, place = raw[count:], place + count

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def _line_places(
    bounds: Sequence[tuple[int, int]], shape: Sequence[int], at: int, count: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Places in a tensor of the lines `at` to `at + count` of a block: stretches of its last dimension."""
    if len(shape) < 2:
        return np.array([start for start, _ in bounds] or [0])
    within = np.unravel_index(np.arange(at, at + count), [stop - start for start, stop in bounds[:-1]])
    index = [one + start for one, (start, _) in zip(within, bounds[:-1], strict=True)]
    return np.ravel_multi_index(index, tuple(shape[:-1])) * shape[-1] + bounds[-1][0]


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
