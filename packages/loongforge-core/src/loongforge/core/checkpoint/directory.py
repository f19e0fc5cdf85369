"""The directory of a run: where checkpoints lie, which one is the latest, what they hold.

    <save>/config.yaml            the resolved run
    <save>/metrics.jsonl          one line per step
    <save>/latest                 the name of the newest complete checkpoint
    <save>/checkpoints/step_00000040/manifest.json + megatron-core's torch_dist files

A checkpoint is written under a name that starts with a dot and appears under its own by one rename; `latest` follows by
another. A killed process therefore leaves either the old state or the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loongforge.core.config.dump import to_yaml
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import CheckpointError

if TYPE_CHECKING:
    from loongforge.core.megatron.groups import World

FORMAT = 2
"""Version of the manifest; a higher one is refused. Since 2 every optimizer of a run has its own common state."""

_STEP = re.compile(r"step_(\d{8,})")

_KINDS = {
    "step": int,
    "consumed_samples": int,
    "train_iters": int,
    "layout": dict,
    "precision": str,
    "optimizer": bool,
    "distributed_optimizer": bool,
    "fingerprint": dict,
    "quarantine": dict,
    "format": int,
}
"""What a manifest's fields must be when they are read back."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds, readable without torch."""

    step: int
    """Optimizer steps done."""
    consumed_samples: int
    train_iters: int
    """Steps the run was going to take."""
    layout: Mapping[str, Any]
    precision: str
    optimizer: bool
    """Whether optimizer state was saved."""
    distributed_optimizer: bool
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    """Facts about the data that must not change for an exact resume."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Distributions that took part."""
    lora: Mapping[str, Any] = field(default_factory=dict)
    """Rank, alpha, modules and patterns of adapters; empty without any."""
    quarantine: Mapping[str, Any] = field(default_factory=dict)
    """Conversations that could not be read while training; empty without any. See `core.data.quarantine`."""
    format: int = FORMAT


class RunDirectory:
    """Names and atomic moves below one `--save` directory. Holds no state."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: int) -> Path:
        """Where the complete checkpoint of a step lies."""
        return self.root / "checkpoints" / f"step_{step:08d}"

    def draft(self, step: int) -> Path:
        """Where the checkpoint of a step is written before it is complete."""
        return self.root / "checkpoints" / f".step_{step:08d}.partial"

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        folder = self.root / "checkpoints"
        names = [_STEP.fullmatch(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name.group(1)) for name in names if name and (self.path(int(name.group(1)))).is_dir())

    def latest(self) -> Path | None:
        """The checkpoint `latest` points to; None when there is none. `CheckpointError` when it points nowhere.

        Without the file the newest one: a run killed between the two has published its first and not yet named it.
        """
        pointer = self.root / "latest"
        if not pointer.is_file():
            steps = self.steps()
            return self.path(steps[-1]) if steps else None
        name = pointer.read_text().strip()
        target = self.root / "checkpoints" / name
        if not _STEP.fullmatch(name) or not target.is_dir():
            others = ", ".join(f"step_{step:08d}" for step in self.steps()) or "none"
            raise CheckpointError(
                f"{pointer} names {name!r}, which is not there. Complete checkpoints: {others}. "
                "Write one of them into that file, or point --load at its directory."
            )
        return target

    def prepare(self, step: int) -> Path:
        """An empty draft directory for a step; what killed runs left half written or half deleted goes."""
        draft = self.draft(step)
        for left in self.root.glob("checkpoints/.step_*.partial"):
            shutil.rmtree(left)
        draft.mkdir(parents=True)
        return draft

    def publish(self, manifest: Manifest, keep_last: int | None) -> Path:
        """Make the draft of a step the latest checkpoint, then delete what `keep_last` no longer wants.

        The manifest and the hashes of all files, the manifest's included, are written here.
        """
        from megatron.core.dist_checkpointing.validation import save_integrity_manifest

        draft, target = self.draft(manifest.step), self.path(manifest.step)
        write_text(draft / "manifest.json", json.dumps(asdict(manifest), indent=1) + "\n")
        save_integrity_manifest(str(draft))
        sync(draft / "integrity.json")
        sync(draft)
        if target.exists():
            self._delete(target)
        draft.rename(target)
        sync(target.parent)
        write_text(self.root / "latest", target.name + "\n")
        if keep_last:
            for old in self.steps()[:-keep_last]:
                if old != manifest.step:
                    self._delete(self.path(old))
        return target

    def _delete(self, checkpoint: Path) -> None:
        """Take the name away first: a checkpoint that is half deleted must not look complete."""
        doomed = checkpoint.with_name(f".{checkpoint.name}.old.partial")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)


def open_run_directory(config: RunConfig, world: World) -> Path | None:
    """Make `--save` and leave the resolved configuration in it; None without `--save`. All ranks raise together."""
    if not config.checkpoint.save:
        return None
    directory, problems = Path(config.checkpoint.save), []
    try:
        if world.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            write_text(directory / "config.yaml", to_yaml(config))
    except OSError as error:
        problems.append(f"cannot write into --save {directory}: {error}. Give a directory that can be written.")
    if problems := world.agree(problems):
        raise CheckpointError("\n".join(problems))
    return directory


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint directory, checked."""
    path = checkpoint / "manifest.json"
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError("it is not an object")
        if isinstance(number := content.get("format"), int) and number > FORMAT:
            raise CheckpointError(f"{path} has format {number}, this version reads {FORMAT}. Upgrade loongforge-core.")
        manifest = Manifest(**content)
        for name, kind in _KINDS.items():
            if type(getattr(manifest, name)) is not kind:
                raise TypeError(f"{name} is {getattr(manifest, name)!r}, not of type {kind.__name__}")
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no manifest.json.") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Load another checkpoint of this run.") from error
    return manifest


def write_text(path: Path, text: str) -> None:
    """Replace a file in one move, so that a reader sees the old text or the new one."""
    draft = path.with_name(f".{path.name}.partial")
    with draft.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a directory's names to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
