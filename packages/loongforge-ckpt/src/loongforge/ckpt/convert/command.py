"""`loongforge convert SRC DST`: the direction follows from what SRC is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from loongforge.core.config.run import RunConfig
from loongforge.core.errors import CheckpointError, ConfigError

USAGE = """\
usage: loongforge convert SRC DST [layout flags] [overrides]

SRC a Hugging Face directory: writes the run directory DST, whose checkpoint holds the weights alone (torch_dist, loads
on any layout). Train on from it with `loongforge train --load DST --finetune ...`.
SRC a run directory or one of its checkpoints: writes the Hugging Face directory DST; of a run with adapters these, as a
PEFT directory.

Numbers are copied, never rounded, unless --bf16 or --fp32 says otherwise. One process holds the whole model in host
memory; --tensor-model-parallel-size and --pipeline-model-parallel-size spread it over as many.

examples:
  loongforge convert Qwen3-0.6B runs/start
  loongforge convert Qwen3-32B runs/start --tensor-model-parallel-size 4
  loongforge convert runs/first Qwen3-trained
  loongforge convert runs/first/checkpoints/step_00000040 Qwen3-trained
"""


def command(argv: list[str]) -> int:
    """Convert; 0 when DST is complete."""
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return 0
    if len(argv) < 2 or argv[0].startswith("-") or argv[1].startswith("-"):
        raise ConfigError("convert: two directories are needed: loongforge convert SRC DST [flags].")
    source, target, rest = Path(argv[0]).expanduser(), Path(argv[1]).expanduser(), argv[2:]
    if not source.is_dir():
        raise ConfigError(f"convert: no directory {str(source)!r}.")
    if source.resolve() == target.resolve():
        raise ConfigError(f"convert: SRC and DST are the same directory, {str(source)!r}.")
    checkpoint = _own_checkpoint(source)
    if checkpoint is None:
        _import(source, target, rest)
    else:
        _export(source, checkpoint, target, rest)
    print(f"Wrote {target}.")
    return 0


def _own_checkpoint(source: Path) -> Path | None:
    """The checkpoint to read when SRC is one of ours or a run that has one."""
    from loongforge.core.checkpoint.directory import RunDirectory

    return source if (source / "manifest.json").is_file() else RunDirectory(source).latest()


def _import(source: Path, target: Path, rest: list[str]) -> None:
    from loongforge.ckpt.convert.work import to_checkpoint
    from loongforge.ckpt.workers import run_workers

    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: is not an empty directory. Choose a new one for the checkpoint.")
    config = _resolve(source, _source_precision(source), rest)
    if config.parallel.use_distributed_optimizer:
        raise ConfigError("convert: there is no optimizer to distribute; leave out --use-distributed-optimizer.")
    section = replace(config.checkpoint, save=str(target), no_save_optim=True, async_save=False)
    run_workers(replace(config, checkpoint=section), to_checkpoint, "convert")


def _export(source: Path, checkpoint: Path, target: Path, rest: list[str]) -> None:
    from loongforge.ckpt.convert.work import to_hf
    from loongforge.ckpt.workers import run_workers
    from loongforge.core.checkpoint.directory import read_manifest

    run = source if (source / "config.yaml").is_file() else checkpoint.parent.parent
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: has no config.yaml, which says what model the checkpoint holds. Restore it.")
    manifest = read_manifest(checkpoint)
    config = _resolve(run, manifest.precision, rest)
    if manifest.lora:
        config = _with_adapters(config, manifest.lora, run / "config.yaml")
    run_workers(config, partial(to_hf, checkpoint=str(checkpoint), target=str(target)), "convert")


def _with_adapters(config: RunConfig, facts: Mapping[str, Any], saved: Path) -> RunConfig:
    """The run with the adapters that its checkpoint holds, and the model that they belong to."""
    from loongforge.core.config import yaml_file
    from loongforge.core.config.lora import LoraConfig

    section: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()
    }
    base = (yaml_file.read(saved).get("checkpoint") or {}).get("load")
    foundation = replace(config.model.foundation, load=base)
    return replace(config, lora=LoraConfig(**section), model=replace(config.model, foundation=foundation))


def _resolve(load: Path, precision: str, rest: list[str]) -> RunConfig:
    from loongforge.core.config.resolve import resolve

    defaults = ["--load", str(load), f"--{precision}", "--train-iters", "1", "--seq-length", "128"]
    if "--fp32" in rest or "--bf16" in rest:
        defaults.remove(f"--{precision}")
    return resolve([*defaults, *rest])


def _source_precision(source: Path) -> str:
    """The type that holds every number of the source: bf16 where all tensors are bf16, else fp32."""
    from safetensors import SafetensorError, safe_open

    from loongforge.ckpt.hf.directory import locate

    where, problems = locate(source)
    if problems:
        raise CheckpointError("\n".join(problems))
    kinds: set[Any] = set()
    for file in sorted(set(where.values())):
        try:
            with safe_open(source / file, framework="pt") as tensors:
                kinds |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{source / file}: truncated or corrupt ({error}). Download it again.") from error
    return "bf16" if kinds == {"BF16"} else "fp32"
