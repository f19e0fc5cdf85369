"""Split a command line into flags and overrides; nothing is looked up and nothing is merged here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from loongforge.core.config.flags import Flag, accepted
from loongforge.core.config.flags_refused import refused
from loongforge.core.config.run import RunConfig

_OVERRIDE = re.compile(r"(?P<mark>\+\+|\+|~)?(?P<key>[A-Za-z_./][^=\s]*)(?P<value>=.*)?", re.DOTALL)
_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A field that a flag sets."""

    flag: str
    """As it was typed, with its dashes."""
    path: str
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A Hydra override; `+key=v`, `++key=v` and `key=v` mean the same, for unknown keys are refused later."""

    text: str
    """As it was typed."""
    mark: str
    key: str
    """With underscores; a group choice (`models/qwen3@model.foundation`) as typed."""
    value: str | None

    @property
    def is_choice(self) -> bool:
        """True when it chooses a YAML file of a group, not a value."""
        return "/" in self.key or "@" in self.key

    def hydra(self) -> str:
        """In Hydra's own grammar."""
        value = "" if self.value is None else f"={self.value}"
        if self.is_choice or self.mark == "~":
            return f"{self.mark}{self.key}{value}"
        return f"++{self.key}{value}"


@dataclass(slots=True, kw_only=True)
class Arguments:
    """What a command line says."""

    config_file: str | None = None
    model_name: str | None = None
    given: dict[str, Given] = field(default_factory=dict[str, Given])
    """By path."""
    overrides: list[Override] = field(default_factory=list[Override])
    problems: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    """What was taken and changes nothing."""


def parse(argv: Sequence[str]) -> Arguments:
    """Read every word of `argv`; what cannot be read is in `problems`."""
    arguments = Arguments()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            _read_flag(word, words, arguments)
        elif (override := _override(word)) is not None:
            _keep_override(override, arguments)
        else:
            hint = f" Did you mean --config-file {word}?" if word.endswith((".yaml", ".yml")) else ""
            arguments.problems.append(f"{word!r}: neither a flag (--name value) nor an override (key=value).{hint}")
    return arguments


def _read_flag(word: str, rest: list[str], arguments: Arguments) -> None:
    typed, equals, attached = word.partition("=")
    name = typed.removeprefix("--").replace("_", "-")
    flag = accepted().get(name)
    if flag is None:
        arguments.problems.append(_unknown(typed, name))
        while rest and not _ends_values(rest[0]):  # its values are part of the same mistake
            rest.pop(0)
        return
    values = [attached] if equals else _values(flag, rest)
    if flag.takes == "switch":
        value = _switched(flag, typed, values, arguments.problems)
    elif not values:
        arguments.problems.append(f"{typed}: needs a value.")
        return
    elif flag.alone and len(values) > 1:
        arguments.problems.append(f"{typed}: takes one value here, got {' '.join(values)}.")
        return
    elif flag.refuses and values[0] in flag.refuses:
        arguments.problems.append(f"{typed}: {values[0]!r} is refused, {flag.refuses[values[0]]}.")
        return
    elif flag.takes == "many" and not flag.alone:
        value = values
    else:
        value = (flag.values or {}).get(values[0], values[0])
    _keep(Given(flag=typed, path=flag.path, value=value), flag, arguments)


def _values(flag: Flag, rest: list[str]) -> list[str]:
    """Take the words that belong to `flag` off `rest`."""
    if flag.takes == "switch":
        takes_word = isinstance(flag.writes, bool) and not flag.because
        return [rest.pop(0)] if takes_word and rest and rest[0].lower() in _WORDS else []
    if flag.takes == "one":
        return [rest.pop(0)] if rest and not rest[0].startswith("--") else []
    found: list[str] = []
    while rest and not _ends_values(rest[0]):
        found.append(rest.pop(0))
    return found


def _switched(flag: Flag, typed: str, values: list[str], problems: list[str]) -> Any:
    if not values:
        return flag.writes
    word = _WORDS.get(values[0].lower())
    if word is None or not isinstance(flag.writes, bool) or flag.because:
        allowed = "true or false" if isinstance(flag.writes, bool) and not flag.because else "no value"
        problems.append(f"{typed}: takes {allowed}, got {values[0]!r}.")
        return flag.writes
    return flag.writes if word else not flag.writes


def _keep(given: Given, flag: Flag, arguments: Arguments) -> None:
    if flag.name == "config-file":
        arguments.config_file = given.value
    elif flag.name == "model-name":
        arguments.model_name = given.value
    elif flag.needless:
        arguments.notes.append(f"note: {given.flag} changes nothing here: {flag.because}.")
    elif flag.because:
        if flag.accepts and given.value not in flag.accepts:
            allowed = " or ".join(repr(value) for value in flag.accepts)
            arguments.problems.append(
                f"{given.flag}: {given.value!r} is not possible, {flag.because}. Use {allowed} or leave it out."
            )
    else:
        before = arguments.given.get(given.path)
        if before and before.value != given.value and _name(before.flag) != _name(given.flag):
            arguments.problems.append(f"{before.flag} and {given.flag} contradict each other: both set {given.path}.")
        arguments.given[given.path] = given


def _keep_override(override: Override, arguments: Arguments) -> None:
    if override.key.split(".")[0] == "hydra":
        arguments.problems.append(f"{override.text!r}: Hydra's own settings have no effect here. Remove it.")
    elif override.value is None and override.mark != "~":
        arguments.problems.append(f"{override.text!r}: an override needs a value: {override.key}=VALUE.")
    else:
        arguments.overrides.append(override)


def _override(word: str) -> Override | None:
    match = _OVERRIDE.fullmatch(word)
    if match is None or not (match["value"] or match["mark"]):
        return None
    key = match["key"]
    if "/" not in key and "@" not in key:
        key = key.replace("-", "_")
    value = match["value"][1:] if match["value"] else None
    return Override(text=word, mark=match["mark"] or "", key=key, value=value)


def _ends_values(word: str) -> bool:
    """True for a flag or an override; a path may hold `=`, so an override must name a section of the run."""
    if word.startswith("--"):
        return True
    override = _override(word)
    if override is None:
        return False
    sections = {section.name for section in fields(RunConfig)}
    return override.key.split(".")[0] in sections or (override.is_choice and "@" in override.key)


def _unknown(typed: str, name: str) -> str:
    if name in refused():
        refusal = refused()[name]
        return f"{typed}: refused, {refusal.because}. {refusal.remedy}."
    near = difflib.get_close_matches(name, [*accepted(), *refused()], n=1)
    hint = f" Did you mean --{near[0]}?" if near else " `loongforge train --help` lists every flag."
    return f"{typed}: unknown flag.{hint}"


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("_", "-")
