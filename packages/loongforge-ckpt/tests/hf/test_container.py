"""Our incremental safetensors files against the library that defines the format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loongforge.ckpt.hf.container import ContainerPart, ContainerWriter, Entry, create


def entry(name: str, tensor: torch.Tensor) -> Entry:
    return Entry(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))


def test_safetensors_reads_every_type_and_shape(tmp_path: Path) -> None:
    tensors = {
        "double": torch.randn(3, dtype=torch.float64),
        "column-sliced": torch.randn(5, 8)[:, 2:5],
        "empty": torch.zeros(0, 4),
        "half": torch.randn(3, 3).half(),
        "brain, odd length": torch.randn(7).bfloat16(),
        "token \u4e2d": torch.arange(5, dtype=torch.uint8),
        "scalar": torch.tensor(True),
    }
    file = tmp_path / "x.safetensors"
    with ContainerWriter(file, [entry(name, tensor) for name, tensor in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    back = load_file(file)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_only_what_was_announced(tmp_path: Path) -> None:
    tensor = torch.randn(3)
    with (
        pytest.raises(AssertionError, match="was announced"),
        ContainerWriter(tmp_path / "x", [entry("a", tensor)]) as writer,
    ):
        writer.write("b", tensor)
    with pytest.raises(AssertionError, match="did not come"), ContainerWriter(tmp_path / "x", [entry("a", tensor)]):
        pass


def test_parts_of_several_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks along every dimension, turned around, of another type, larger than the buffer; all bytes and no other."""
    monkeypatch.setattr("loongforge.ckpt.hf.container.BUFFER", 100)
    whole = {
        "rows": torch.randn(6, 9),
        "columns": torch.randn(7, 8).bfloat16(),
        "experts": torch.randn(3, 5, 6),
        "kernel": torch.randn(4, 2, 3, 3),
        "vector": torch.randn(50),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }
    entries = [entry(name, tensor) for name, tensor in whole.items()]
    create(tmp_path / "x", entries)
    every = slice(None)
    shares: list[list[tuple[str, tuple[slice, ...]]]] = [
        [("rows", (slice(0, 4),)), ("columns", (every, slice(0, 3))), ("scalar", ()), ("vector", (slice(0, 20),))],
        [("rows", (slice(4, 6),)), ("columns", (every, slice(3, 8))), ("empty", ()), ("vector", (slice(20, 50),))],
        [("experts", (slice(0, 1), every, slice(2, 6))), ("experts", (slice(1, 3),))],
        [("experts", (slice(0, 1), every, slice(0, 2))), ("kernel", (every, slice(1, 2)))],
        [("kernel", (every, slice(0, 1)))],
    ]
    parts = [ContainerPart(tmp_path / "x", entries) for _ in shares]
    for part, share in zip(parts, shares, strict=True):
        with part:
            for name, block in share:
                values = whole[name][block]
                turned = values.mT.contiguous().mT if values.dim() > 1 else values
                part.write(name, block, turned.double() if name == "columns" else turned)
    assert sum(part.written for part in parts) == sum(one.bytes for one in entries)
    for name, tensor in load_file(tmp_path / "x").items():
        assert torch.equal(tensor, whole[name]), name


def test_a_part_of_another_shape(tmp_path: Path) -> None:
    entries = [entry("a", torch.zeros(4, 3))]
    create(tmp_path / "x", entries)
    with pytest.raises(AssertionError, match="was announced"), ContainerPart(tmp_path / "x", entries) as part:
        part.write("a", (slice(0, 2),), torch.zeros(3, 3))
