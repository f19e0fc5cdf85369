"""`loongforge train`: from a command line to running workers."""

from __future__ import annotations

from pathlib import Path

from loongforge.core import env
from loongforge.core.config.run import RunConfig
from loongforge.core.errors import ConfigError, DataError


def command(argv: list[str]) -> int:
    """Train as `argv` says; `--dry-run` stops after the plan.

    Everything that can be wrong with the arguments or the layout is found before torch is imported.
    """
    if {"-h", "--help"} & set(argv):
        from loongforge.core.config.describe import describe_flags

        print(describe_flags())
        print("  --dry-run\n      Print the plan and stop, as `loongforge plan` does.")
        return 0
    dry = [word for word in argv if word in ("--dry-run", "--dry_run")]
    from loongforge.core.checkpoint.sources import sources
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.cli.launch import world_size
    from loongforge.core.config import resolve
    from loongforge.core.plan import Plan

    config = resolve.resolve([word for word in argv if word not in dry])
    nproc = workers_here(config)
    world = world_size(config.launch, nproc)
    if dry:
        from loongforge.core.cli.plan import show

        show(config, world)
        return 0
    Plan.of(config, world)
    check_data_paths(config)
    sources(config.model, find_start(config.checkpoint))
    return _launch(config, nproc)


def check_data_paths(config: RunConfig) -> None:
    """Raise `DataError` where there are no data, or no such files, before anything slow is imported.

    Files only where a source of ours will read them: another wheel's source may mean something else by a path.
    """
    from loongforge.core.data.paths import without_weights
    from loongforge.core.data.source import source_of

    section, source = config.data, source_of(config)
    if source.name not in ("text", "chat", "vlm"):
        return
    absent: list[str] = []
    for flag, words in (("--data-path", section.data_path), ("--valid-data-path", section.valid_data_path)):
        absent += [
            f"{flag}: no file {word!r}, nor {word}.bin beside {word}.idx."
            for word in without_weights(words)
            if not (Path(word).exists() or Path(f"{word}.bin").exists())
        ]
    if absent:
        raise DataError(*absent)


def workers_here(config: RunConfig) -> int:
    """Workers of this node: as configured, or as a PyTorchJob says, or one per accelerator, or one on CPU.

    Raises `ConfigError` when more are asked for than the node has devices.
    """
    from loongforge.core.platform import choose

    choice, container = choose(config.platform), env.container()
    asked = config.launch.nproc_per_node or (container.workers if container else None)
    if choice.spec.device == "cpu":
        return asked or 1
    devices = choice.platform().device_count()
    if asked and devices and asked > devices:
        raise ConfigError(
            f"launch.nproc_per_node={asked} is more than the {devices} {choice.name} device(s) here: "
            f"use at most {devices}."
        )
    return asked or max(1, devices)


def run_worker(config: RunConfig) -> None:
    """What every worker runs."""
    from loongforge.core.run import train

    train(config)


def _launch(config: RunConfig, nproc: int) -> int:
    from loongforge.core.cli.launch import launch
    from loongforge.core.platform import choose

    platform = choose(config.platform).platform()

    def ahead() -> None:
        from loongforge.core.megatron.start import preload

        preload(platform)

    return launch(config, run_worker, nproc=nproc, preload=ahead if platform.fork_safe else None)
