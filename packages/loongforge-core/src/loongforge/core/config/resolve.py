"""From a command line to the typed run. Precedence: defaults < model YAML < run YAML < flags < overrides."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from omegaconf import OmegaConf

from loongforge.core import env
from loongforge.core.config import arguments as command_line
from loongforge.core.config import families, loaded, typed
from loongforge.core.config.arguments import Arguments
from loongforge.core.config.components import RUN_LAYOUT, SLOTS
from loongforge.core.config.compose import Composed, compose, plain
from loongforge.core.config.families import Size
from loongforge.core.config.loaded import Checkpoint, Wanted
from loongforge.core.config.run import RANDOM, RunConfig
from loongforge.core.config.yaml_file import literal
from loongforge.core.errors import ConfigError


def say(note: str) -> None:
    """Print a note on standard error, once per job."""
    worker = env.worker()
    if worker is None or worker.rank == 0:
        print(note, file=sys.stderr)


def resolve(argv: Sequence[str], note: Callable[[str], None] = say) -> RunConfig:
    """The run that `argv` describes; imports no torch.

    `argv` is `--config-file FILE`, `--model-name NAME` or `--load DIR`, flags as Megatron spells them, Hydra overrides.
    `note` hears what a user should know: a flag that beats a YAML file, a checkpoint that differs from the model named.
    Raises one `ConfigError` with every problem that was found.
    """
    arguments = command_line.parse(argv)
    size = _size(arguments)
    flags = {given.path: given.value for given in arguments.given.values()}
    try:
        composed = compose(arguments.config_file, size, flags, arguments.overrides)
        checkpoint, parts = _checkpoint(composed, note), _parts(composed, note)
        content = _merged(composed, checkpoint, parts)
    except ConfigError as error:
        raise ConfigError(*arguments.problems, *error.problems) from error
    overridden = _overridden(arguments, content)
    _settle_layout(content, arguments, note)
    _settle_adapters(content, arguments)
    origins = {given.path: given.flag for given in arguments.given.values()}
    run = typed.build(content, origins, arguments.problems)
    _tell_beaten(arguments, composed.yaml_only, note)
    for sentence in (*arguments.notes, *overridden):
        note(sentence)
    _tell_differences(run, checkpoint, parts, note)
    return run


def _size(arguments: Arguments) -> Size | None:
    if arguments.model_name is None:
        return None
    try:
        return families.named(arguments.model_name)
    except ConfigError as error:
        raise ConfigError(*arguments.problems, *error.problems) from error


def _checkpoint(composed: Composed, note: Callable[[str], None]) -> Checkpoint | None:
    """What the directory to load says; required to say the model when nothing else does."""
    directory = OmegaConf.select(composed.everything, "checkpoint.load")
    if not isinstance(directory, str):
        return None
    named = _at(composed.yaml_only, "model.foundation.family") is not None
    try:
        checkpoint = loaded.inspect(directory, _wanted(composed))
    except ConfigError as error:
        if not named:
            raise
        note(f"note: the model is as named, not compared with the checkpoint: {error}")
        return None
    if not named and (checkpoint is None or not checkpoint.model):
        raise ConfigError(loaded.refusal(directory))
    return checkpoint


def _parts(composed: Composed, note: Callable[[str], None]) -> dict[str, tuple[str, Checkpoint]]:
    """What the directories say that components load from, by slot; whether they can be loaded is asked at the start."""
    found: dict[str, tuple[str, Checkpoint]] = {}
    for slot in SLOTS:
        directory = OmegaConf.select(composed.everything, f"model.{slot}.load")
        if not isinstance(directory, str) or directory == RANDOM:
            continue
        try:
            checkpoint = loaded.inspect(directory, Wanted(family=None, model_type=None))
        except ConfigError as error:
            note(f"note: model.{slot} is as named, not compared with what it loads: {error}")
            continue
        if checkpoint is not None:
            found[slot] = directory, checkpoint
    return found


def _wanted(composed: Composed) -> Wanted:
    return Wanted(
        family=OmegaConf.select(composed.everything, "model.foundation.family"),
        model_type=OmegaConf.select(composed.everything, "model.model_type"),
    )


def _merged(
    composed: Composed, checkpoint: Checkpoint | None, parts: Mapping[str, tuple[str, Checkpoint]]
) -> dict[str, Any]:
    """What is loaded beneath everything else; its model only where no YAML names one, its tokenizer in any case."""
    tokenizer: dict[str, Any] = dict(parts["foundation"][1].tokenizer) if "foundation" in parts else {}
    beneath: dict[str, Any] = {}
    if checkpoint is not None:
        tokenizer |= checkpoint.tokenizer
        if _at(composed.yaml_only, "model.foundation.family") is None:
            kept = {
                name: value
                for name, value in checkpoint.model.items()
                if _at(composed.yaml_only, f"model.{name}.family") is None
            }
            beneath["model"] = literal(kept)
    if tokenizer:
        beneath["tokenizer"] = literal(tokenizer)
    if not beneath:
        return plain(composed.everything)
    merged = OmegaConf.merge(beneath, composed.everything)
    return plain(merged)  # pyright: ignore[reportArgumentType]


def _settle_layout(content: dict[str, Any], arguments: Arguments, note: Callable[[str], None]) -> None:
    """Let the later of `parallel.X` and `model.foundation.X` win, as flags win over YAML and overrides over flags.

    Both mean the same layout. Two that were said in the same place and differ are left for `typed` to refuse.
    """
    parallel, foundation = _at(content, "parallel"), _at(content, "model.foundation")
    if not isinstance(parallel, dict) or not isinstance(foundation, dict):
        return
    both = cast(dict[str, Any], parallel), cast(dict[str, Any], foundation)
    for name in RUN_LAYOUT:
        if name not in both[0] or name not in both[1] or _same(both[0][name], both[1][name]):
            continue
        paths = (f"parallel.{name}", f"model.foundation.{name}")
        ranks = [_rank(path, arguments) for path in paths]
        if ranks[0] == ranks[1]:
            continue
        winner = 0 if ranks[0] > ranks[1] else 1
        beaten = both[1 - winner].pop(name)
        said = [arguments.given[path].flag if path in arguments.given else path for path in paths]
        note(f"note: {said[winner]}={_shown(both[winner][name])} beats {said[1 - winner]}={_shown(beaten)}.")


def _rank(path: str, arguments: Arguments) -> int:
    """Where a value was said last: 2 in an override, 1 in a flag, 0 in YAML."""
    if any(f"{path}.".startswith(f"{override.key}.") for override in arguments.overrides):
        return 2
    return 1 if path in arguments.given else 0


def _settle_adapters(content: dict[str, Any], arguments: Arguments) -> None:
    """Take what the adapters to begin with are from their directory; a run that says otherwise is refused."""
    section = _at(content, "lora")
    if not isinstance(section, dict):
        return
    said = cast(dict[str, Any], section)
    directory = said.get("adapter_path")
    if not isinstance(directory, str):
        return
    try:
        theirs = loaded.adapters(directory)
    except ConfigError as error:
        arguments.problems.extend(error.problems)
        return
    for name, value in theirs.items():
        if name != "dropout" and said.get(name) is not None and not _same(said[name], value):
            arguments.problems.append(
                f"lora.{name}: {_shown(said[name])} contradicts {_shown(value)} of the adapters in {directory}: leave "
                "it out, they say it."
            )
    content["lora"] = theirs | {name: value for name, value in said.items() if value is not None}


def _tell_beaten(arguments: Arguments, from_yaml: Mapping[str, Any], note: Callable[[str], None]) -> None:
    for given in arguments.given.values():
        before = _at(from_yaml, given.path)
        if before is not None and not _same(before, given.value):
            note(f"note: {given.flag} {_shown(given.value)} beats {given.path}: {_shown(before)} of the YAML file.")


def _overridden(arguments: Arguments, content: Mapping[str, Any]) -> list[str]:
    """Flags that an override of the same field beats."""
    beaten = [(override, arguments.given.get(override.key)) for override in arguments.overrides]
    return [
        f"note: {override.text} beats {given.flag} {_shown(given.value)}."
        for override, given in beaten
        if given is not None and not _same(given.value, _at(content, given.path))
    ]


def _tell_differences(
    run: RunConfig,
    checkpoint: Checkpoint | None,
    parts: Mapping[str, tuple[str, Checkpoint]],
    note: Callable[[str], None],
) -> None:
    """Say where a component differs from the one whose weights it will load."""
    for slot, component in run.model.components.items():
        directory, source = parts.get(slot, (run.checkpoint.load, None if component.load else checkpoint))
        theirs: Mapping[str, Any] = source.model.get(slot, {}) if source else {}
        if source is None or theirs.get("family") != component.family:
            continue
        # What a foreign configuration has no word about is no difference.
        training: tuple[str, ...] = () if source.source == "run" else getattr(component.geometry, "TRAINING", ())
        for name, value in theirs.items():
            ours = getattr(component.geometry, name, value)
            if value is not None and name not in training and not _same(ours, value):
                said = f"the {source.source} in {directory} says {_shown(value)}"
                note(f"note: model.{slot}.{name} is {_shown(ours)}, {said}.")


def _at(content: Mapping[str, Any], path: str) -> Any:
    at: Any = content
    for name in path.split("."):
        if not isinstance(at, Mapping):
            return None
        at = cast(Mapping[str, Any], at).get(name)
    return at


def _same(one: Any, other: Any) -> bool:
    """Equal, whether written as text or as a value: `4` and 4, `1e-4` and 0.0001, a list and a tuple."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        ones, others = cast(list[Any], one), cast(list[Any], other)
        return len(ones) == len(others) and all(map(_same, ones, others))
    if str(one).lower() == str(other).lower():  # pyright: ignore[reportUnknownArgumentType]
        return True
    try:
        return float(cast(Any, one)) == float(other)
    except (TypeError, ValueError):
        return False


def _shown(value: Any) -> str:
    return " ".join(map(str, cast(list[Any], value))) if isinstance(value, list | tuple) else str(value)
