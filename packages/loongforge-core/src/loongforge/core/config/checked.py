"""Check plain values against a frozen dataclass, and say in our words what is wrong and where."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from loongforge.core.errors import ConfigError

STRICTNESS = ConfigDict(extra="forbid", coerce_numbers_to_str=True, use_attribute_docstrings=True)
"""Unknown keys are errors; `0.3` in a weighted list of files is a text."""

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text", "tuple": "a list"}
"""How a type is called in a message, by the head of pydantic's error type."""


@dataclass(slots=True, kw_only=True)
class Problems:
    """What is wrong, and which flag said it."""

    origins: Mapping[str, str]
    """Flag by the dotted path that it set."""
    found: list[str] = field(default_factory=list[str])

    def add(self, path: str, text: str) -> None:
        """Note a problem at a dotted path."""
        origin = f" ({self.origins[path]})" if path in self.origins else ""
        self.found.append(f"{path}{origin}: {text}")


def check(kind: type, value: Mapping[str, Any], path: str, problems: Problems, more: tuple[str, ...] = ()) -> Any:
    """An instance of the dataclass `kind`, or None after noting what is wrong. `more`: other legal keys, for hints."""
    try:
        return adapter(kind).validate_python({path: dict(value)})[path]
    except ConfigError as error:  # the dataclass's own rules
        for one in error.problems:
            _place(kind, path, one, problems)
    except ValidationError as error:
        done: set[str] = set()
        for one in error.errors(include_url=False):
            where, text = _phrase(kind, path, one, more)
            if where not in done:  # every member of a union complains on its own
                problems.add(where, text)
            done.add(where)
    return None


@cache
def adapter(kind: type) -> TypeAdapter[dict[str, Any]]:
    """A validator of `{path: fields}`; around a dictionary, because pydantic takes settings only from outside."""
    return TypeAdapter(dict[str, kind], config=STRICTNESS)  # pyright: ignore[reportInvalidTypeForm]


def mapping(value: Any, path: str, problems: Problems) -> dict[str, Any]:
    """A section as a dictionary of its own; nothing given is an empty one, anything else a problem."""
    if isinstance(value, Mapping):
        return dict(cast(Mapping[str, Any], value))
    if value is not None:
        problems.add(path, f"is a section with fields of its own, got {value!r}.")
    return {}


def _place(kind: type, path: str, text: str, problems: Problems) -> None:
    """Note what a dataclass says of itself, under the field that it names or under the whole."""
    name, _, rest = text.partition(": ")
    if not path or text.startswith((f"{path}.", f"{path}:")):
        problems.found.append(text)
    elif rest and name in {one.name for one in fields(kind)}:
        problems.add(f"{path}.{name}", rest)
    else:
        problems.found.append(f"{path}: {text}")


def _phrase(kind: type, path: str, error: Any, more: tuple[str, ...]) -> tuple[str, str]:
    """Where pydantic's complaint belongs, and the complaint in our words."""
    location = [part for part in error["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
    where = ".".join(str(part) for part in (path, *location) if part != "")
    value, label = error["input"], str(error["type"])
    if label == "unexpected_keyword_argument":
        return where, unknown(str(location[-1]), value, [*(one.name for one in fields(kind)), *more])
    if label.startswith("missing"):
        return where, "is required and not given."
    if label == "literal_error":
        near = difflib.get_close_matches(str(value), str(error["ctx"]["expected"]).split("'"), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return where, f"{value!r} is not allowed; use {error['ctx']['expected']}.{hint}"
    if label == "value_error":
        return where, str(error["ctx"]["error"])
    named = KINDS.get(label.split("_")[0])
    return where, f"must be {named}, got {value!r}." if named else f"{error['msg']}, got {value!r}."


def unknown(name: str, value: Any, known: list[str]) -> str:
    """What to say of a key that nothing has."""
    known = sorted(one for one in known if one != "geometry")
    near = difflib.get_close_matches(name, known, n=1)
    return f"unknown key (value {value!r}). " + (
        f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(known)}."
    )
