"""Tensors stored in fp8 with one scale for each block of rows and columns, read as numbers (DeepSeek-V3, 2024, 3.3)."""

from __future__ import annotations

from typing import Any

import torch

FP8 = "F8_E4M3"
"""The stored type, in the words of safetensors."""
SCALES = "_scale_inv"
"""What the name of the scales has behind that of their tensor. A value is the stored number times its scale."""

Block = tuple[int, int]


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Shape of the scales of a tensor `[..., rows, columns]`; the last blocks may be cut."""
    return (*shape[:-2], *(-(-size // length) for size, length in zip(shape[-2:], block, strict=True)))


class Dequantised:
    """Looks like a slice of a safetensors file that is not read yet; what is read of it is fp32.

    Only the asked-for numbers and the scales of their blocks are read.
    """

    def __init__(self, values: Any, scales: Any, block: Block) -> None:
        self._values, self._scales, self._block = values, scales, block

    def get_shape(self) -> list[int]:
        """Shape of the whole tensor."""
        return self._values.get_shape()

    def get_dtype(self) -> str:
        """The stored type."""
        return self._values.get_dtype()

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        """Stretches of the first dimensions, the others whole, in fp32."""
        sizes = self.get_shape()
        whole = (slice(None),) * (len(sizes) - len(index))
        asked = [slice(*one.indices(size)[:2]) for one, size in zip((*index, *whole), sizes, strict=True)]
        *leading, rows, columns = asked
        (height, width), (row, column) = self._block, (rows.start, columns.start)
        values = self._values[tuple(asked)].to(torch.float32)
        scales = self._scales[(*leading, _blocks(rows, height), _blocks(columns, width))].to(torch.float32)
        wide = scales.repeat_interleave(width, -1).narrow(-1, column % width, columns.stop - column)
        # Block row by block row: scales as large as the values would double what a large matrix takes.
        for number, start in enumerate(range(row - row % height, rows.stop, height)):
            here = slice(max(start, row) - row, min(start + height, rows.stop) - row)
            values[..., here, :] *= wide[..., number : number + 1, :]
        return values


def _blocks(stretch: slice, length: int) -> slice:
    """Blocks that a stretch touches."""
    return slice(stretch.start // length, -(-stretch.stop // length))
