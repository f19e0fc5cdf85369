"""What one worker of a conversion does."""

from __future__ import annotations

from pathlib import Path

from loongforge.ckpt.workers import part_of
from loongforge.core.config.run import RunConfig


def to_checkpoint(config: RunConfig) -> None:
    """Load the directory of `checkpoint.load` and save step 0 below `checkpoint.save`, as the trainer saves."""
    with part_of(config) as part:
        from loongforge.core.checkpoint.directory import write_text
        from loongforge.core.checkpoint.load import load_weights
        from loongforge.core.checkpoint.save import Saver
        from loongforge.core.checkpoint.start import find_start
        from loongforge.core.config.dump import to_yaml
        from loongforge.core.step.optimizer import build_training

        load_weights(part.plan, part.world, part.model, find_start(config.checkpoint))
        saver = Saver(part.plan, part.world, fingerprint={})
        saver.save(build_training(part.plan, part.world, part.model), step=0, consumed_samples=0)
        saver.finish()
        if part.world.is_main:
            assert config.checkpoint.save is not None, "the command sets it"
            write_text(Path(config.checkpoint.save) / "config.yaml", to_yaml(config))


def to_hf(config: RunConfig, checkpoint: str, target: str) -> None:
    """Load a checkpoint of ours and write a Hugging Face directory."""
    with part_of(config) as part:
        from loongforge.core.checkpoint.export import export_hf
        from loongforge.core.checkpoint.load import load_model

        load_model(part.world, part.model, Path(checkpoint))
        export_hf(part.plan, part.world, part.model, Path(target))
