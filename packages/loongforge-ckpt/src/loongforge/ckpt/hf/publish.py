"""Directories that appear complete under their name, or not at all."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from loongforge.ckpt.hf.directory import replaced


def publish(work: Path, target: Path) -> None:
    """Give the complete directory its name. What had it waits beside, and comes back if this fails."""
    old = replaced(target)
    if target.exists():
        if old.exists():
            shutil.rmtree(old)  # left behind by a run that was killed after its own export had the name
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)  # the export has its name; what stays here the next one removes


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A JSON object, on the disk when this returns."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Put a file or the names in a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> str:
    """What to say of an export that failed."""
    return (
        f"{path}: cannot be written ({error.strerror or error}). What was there before is untouched. "
        "Free space or choose another directory for the export."
    )
