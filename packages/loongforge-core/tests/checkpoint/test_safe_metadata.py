"""Reading `.metadata` calls nothing that is not on the list."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from loongforge.core.checkpoint.safe_metadata import UnsafeCheckpoint, read_metadata, refuse_code


def tensor_entry(dtype: torch.dtype) -> TensorStorageMetadata:
    size = torch.Size([2, 3])
    chunk = ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=size)
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=[chunk])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64])
def test_what_torch_writes_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    content = Metadata(state_dict_metadata={"w": tensor_entry(dtype)}, storage_data={})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    assert read_metadata(tmp_path) == content


def stack_global(module: str, name: str) -> bytes:
    """A pickle that calls `module.name('x')`, with the name looked up by attribute as protocol 4 allows."""

    def text(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text("x") + b"\x85R."


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.serialization", "load"),
        ("collections", "abc"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 4])
def test_every_other_name_is_refused(module: str, name: str, protocol: int, tmp_path: Path) -> None:
    old = f"c{module}\n{name}\n(S'x'\ntR.".encode()
    (tmp_path / ".metadata").write_bytes(stack_global(module, name) if protocol else old)
    with pytest.raises(UnsafeCheckpoint, match=f"asks to call {module}.{name}"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({"a": 1})])
def test_damage_is_not_called_an_attack(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("place", ["../outside", "/etc/hostname", "sub/__0_0.distcp"])
def test_files_outside_the_checkpoint_are_refused(place: str, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    entries: dict[str, Any] = {"object": BytesStorageMetadata()}
    storage = {MetadataIndex("object"): _StorageInfo(relative_path=place, offset=0, length=1)}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(state_dict_metadata=entries, storage_data=storage)))
    with pytest.raises(UnsafeCheckpoint, match="puts object into"):
        refuse_code(tmp_path)
