"""Refuse a checkpoint whose files would run code when they are read.

torch reads `.metadata` and the non-tensor objects of a checkpoint with pickle, which calls whatever the file names.
Here both are read first in a way that can only build what a checkpoint of ours holds; anything else is refused by name.
This protects a user who loads somebody else's checkpoint, unless the files change between this look and the load.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

_PLAIN = {
    "collections": {"OrderedDict"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
}
"""Every name that `.metadata` may mention, besides torch's dtypes; exact, because a prefix would let `os` in through a
module that imports it."""


class UnsafeCheckpoint(Exception):
    """The file names something that a checkpoint does not hold."""


class _Careful(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if name in _PLAIN.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise UnsafeCheckpoint(f"it asks to call {module}.{name}, which no checkpoint needs")


def read_metadata(checkpoint: Path) -> Metadata:
    """The `.metadata` of a checkpoint, built from allowed names only.

    Raises `UnsafeCheckpoint` for any other name, `OSError` when it cannot be read, `ValueError` when it is damaged.
    """
    path = checkpoint / ".metadata"
    try:
        metadata = _Careful(io.BytesIO(path.read_bytes())).load()
    except (UnsafeCheckpoint, OSError):
        raise
    except Exception as error:  # a damaged pickle fails in any way
        raise ValueError(f"{path.name} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{path.name} does not describe a checkpoint")
    return metadata


def refuse_code(checkpoint: Path) -> None:
    """Read everything of a checkpoint that is pickled, calling nothing; errors as `read_metadata`."""
    metadata = read_metadata(checkpoint)
    for index, place in metadata.storage_data.items():
        name = str(place.relative_path)
        if Path(name).name != name or place.transform_descriptors:
            raise UnsafeCheckpoint(f".metadata puts {index.fqn} into {name!r}, which no checkpoint of ours does")
    for index, place in metadata.storage_data.items():
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            continue
        with (checkpoint / place.relative_path).open("rb") as stream:
            stream.seek(place.offset)
            content = stream.read(place.length)
        try:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).split("\n")[0]
            raise UnsafeCheckpoint(
                f"{index.fqn} in {place.relative_path} is more than numbers and text: {reason}"
            ) from error
        except Exception as error:  # a damaged archive fails in any way
            raise ValueError(f"{index.fqn} in {place.relative_path} cannot be read: {error}") from error
