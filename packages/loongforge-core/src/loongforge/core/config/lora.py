"""Low-rank adapters: the `lora` section. Modules are named as Hugging Face names them, and as PEFT does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from loongforge.core.config.bounds import below, refuse

ALL_LINEAR = "all-linear"
"""The target that is every matrix but those of routers."""
REGEX = "re:"
"""What begins a pattern that is a regular expression over whole names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What some modules have instead of the section's own numbers."""

    pattern: str
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on a frozen language model (Hu et al., "LoRA", 2021); off without a rank."""

    rank: int | None = None
    """Rank of the adapters, for example 16. Given, the model is frozen and adapters train."""
    alpha: float | None = None
    """An adapter adds alpha / rank times B A x; alpha is the rank when unset."""
    dropout: float = 0.0
    """Probability that an input of an adapter is set to zero while training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023)."""
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Modules with an adapter, by the end of their name (`q_proj`, `mlp.gate`), by a pattern (`layers.*.mlp.*`), or by
    a regular expression over the whole name after `re:`; `all-linear` is every matrix but those of routers."""
    patterns: tuple[str, ...] = ()
    """Other numbers for some modules, such as `*.mlp.* rank=4 alpha=8 dropout=0.1`; of each number the
    first pattern that fits and states it counts."""
    adapter_path: str | None = None
    """PEFT directory to begin with; it says rank, alpha and modules."""

    @property
    def on(self) -> bool:
        """Whether adapters train in place of the model."""
        return self.rank is not None

    def rules(self) -> tuple[Pattern, ...]:
        """`patterns`, read."""
        return tuple(_read(text) for text in self.patterns)

    def __post_init__(self) -> None:
        problems = below(1, "lora", self, "rank")
        if self.alpha is not None and self.alpha <= 0:
            problems.append(f"lora.alpha: must be above 0, got {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            problems.append(f"lora.dropout: must be in [0, 1), got {self.dropout!r}.")
        if not self.target_modules:
            problems.append(f"lora.target_modules: names no module; {ALL_LINEAR} is every matrix but those of routers.")
        for text in self.patterns:
            try:
                _read(text)
            except ValueError as error:
                problems.append(f"lora.patterns: {text!r}: {error}. Write for example '*.mlp.* rank=4 alpha=8'.")
        for text in (*self.target_modules, *(text.split()[0] for text in self.patterns if text.split())):
            if text.startswith(REGEX) and (error := _broken(text)):
                problems.append(f"lora: {text!r} is not a regular expression: {error}.")
        refuse(problems)


def fits(pattern: str, module: str) -> bool:
    """Whether a pattern means this module: the end of its name after a dot, or the whole."""
    if pattern.startswith(REGEX):
        return re.fullmatch(pattern.removeprefix(REGEX), module) is not None
    return fnmatchcase(module, pattern) or fnmatchcase(module, f"*.{pattern}")


def _broken(text: str) -> str | None:
    try:
        re.compile(text.removeprefix(REGEX))
    except re.error as error:
        return str(error)
    return None


def _read(text: str) -> Pattern:
    """A line of `patterns`; `ValueError` says what is wrong with it."""
    pattern, *pairs = text.split() or [""]
    values: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if name not in ("rank", "alpha", "dropout"):
            raise ValueError(f"{pair!r} is not rank=, alpha= or dropout=")
        try:
            values[name] = int(number) if name == "rank" else float(number)
        except ValueError:
            raise ValueError(f"{pair!r} has no number that is a {name}") from None
    if not pattern or not values:
        raise ValueError("a pattern and at least one number are needed")
    if values.get("rank", 1) < 1 or values.get("alpha", 1.0) <= 0 or not 0 <= values.get("dropout", 0.0) < 1:
        raise ValueError("rank is at least 1, alpha above 0, dropout in [0, 1)")
    rank = values.get("rank")
    return Pattern(
        pattern=pattern,
        rank=None if rank is None else int(rank),
        alpha=values.get("alpha"),
        dropout=values.get("dropout"),
    )
