"""Where a run begins: at a checkpoint of its own, at weights somebody else wrote, or at fresh weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loongforge.core import plugins
from loongforge.core.checkpoint.directory import Manifest, RunDirectory, read_manifest
from loongforge.core.config.run import CheckpointConfig
from loongforge.core.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a run begins with."""

    checkpoint: Path | None = None
    """A checkpoint of ours."""
    manifest: Manifest | None = None
    """Its manifest."""
    weights: Path | None = None
    """A directory in a registered foreign format."""
    format: str | None = None
    """Name of that format."""
    weights_only: bool = False
    """Take the weights of `checkpoint` and nothing else."""
    continued: bool = False
    """The run goes on from what it saved itself after it had begun with --load: --no-load-optim and --no-load-rng spoke
    of that beginning, and applied again they would change the run."""

    @property
    def is_fresh(self) -> bool:
        """Nothing is loaded."""
        return self.checkpoint is None and self.weights is None

    @property
    def step(self) -> int:
        """Optimizer steps already done."""
        return self.manifest.step if self.manifest and not self.weights_only else 0

    @property
    def consumed_samples(self) -> int:
        """Samples already used."""
        return self.manifest.consumed_samples if self.manifest and not self.weights_only else 0

    def __str__(self) -> str:
        if self.checkpoint and self.weights_only:
            return f"Starting at step 0 with the weights of {self.checkpoint}."
        if self.checkpoint:
            return f"Resuming at step {self.step}, sample {self.consumed_samples:,}, from {self.checkpoint}."
        if self.weights:
            return f"Starting at step 0 with the {self.format} weights of {self.weights}."
        return "Starting at step 0 with fresh weights."


def find_start(section: CheckpointConfig) -> Start:
    """Decide from the directories alone; loads nothing.

    A run whose own `--save` holds a checkpoint goes on there: the same command, started again after a kill, resumes.
    """
    load = Path(section.load).expanduser() if section.load else None
    save = Path(section.save).expanduser() if section.save else None
    if save and (own := RunDirectory(save).latest()):
        same = load is not None and save.resolve() in (load.resolve(), *load.resolve().parents)
        if section.finetune and (same or load is None):
            raise CheckpointError(
                f"--finetune begins a new run, but --save {save} already holds one. Give the new run a --save of its "
                "own, or drop --finetune to go on with the old one."
            )
        if not same:
            return Start(checkpoint=own, manifest=read_manifest(own), continued=load is not None)
    return _at_load(section, load) if load else Start()


def _at_load(section: CheckpointConfig, path: Path) -> Start:
    if not path.is_dir():
        raise CheckpointError(f"--load {section.load}: no such directory.")
    ours = path if (path / "manifest.json").is_file() else RunDirectory(path).latest()
    if ours:
        return Start(checkpoint=ours, manifest=read_manifest(ours), weights_only=section.finetune)
    if (damaged := path / ".metadata").is_file():
        raise CheckpointError(f"--load {path}: has {damaged.name} but no manifest.json: not a complete checkpoint.")
    for plugin in plugins.usable("checkpoints"):
        if plugin.spec.holds == "adapter":
            continue
        # An export of components side by side is a directory of directories.
        if plugin.spec.detect()(path) or plugin.spec.detect()(path / "foundation"):
            return Start(weights=path, format=plugin.name)
    if section.exit_on_missing_checkpoint or any(path.iterdir()):
        known = ", ".join(plugin.name for plugin in plugins.usable("checkpoints")) or "none"
        raise CheckpointError(
            f"--load {path}: neither a run of LoongForge (no `latest`, no `manifest.json`) nor a registered format "
            f"({known}). Point it at a run, at one of its checkpoints, or at a Hugging Face directory with config.json "
            "and safetensors."
        )
    return Start()
