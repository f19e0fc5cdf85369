"""Our incremental safetensors files against the library that defines the format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from loongforge.ckpt.hf.container import ContainerWriter, Entry


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
