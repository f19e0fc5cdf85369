"""Rotary positions in a `config.json`, in the spelling of transformers 4 and of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
"""What `Rope.read` reads; special keys of every family with rotary positions."""

NAMES = ("rope_type", "type", "rope_theta")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary positions as a file describes them."""

    base: float | None
    """Theta; None when the file leaves it to transformers' default."""
    kind: str
    """`default` for the plain rotation, else the name of a scaling."""
    parameters: Mapping[str, Any]
    """What belongs to the kind."""

    @classmethod
    def read(cls, hf: Mapping[str, Any], kinds: Mapping[str, tuple[str, ...]], model: str) -> tuple[Rope, list[str]]:
        """What the file says, and every problem. `kinds`: the scalings a family knows and the parameters of each."""
        section, given, problems = _section(hf)
        outer, inner = hf.get("rope_theta"), given.get("rope_theta")
        if outer is not None and inner is not None and outer != inner:
            problems.append(f"config.json: rope_theta={outer!r} contradicts {section}.rope_theta={inner!r}.")
        kind, parameters = _kind(given), _parameters(given)
        if kind not in kinds:
            known = " and ".join(map(repr, kinds))
            problems.append(
                f"config.json: {section}.rope_type={kind!r} is not supported, only {known}: it changes the positions; "
                f"set {section} to null to train at the original length."
            )
        elif "partial_rotary_factor" not in kinds[kind] and (share := parameters.pop("partial_rotary_factor", 1)) != 1:
            problems.append(f"config.json: {section}.partial_rotary_factor={share!r} is not supported, only 1.0.")
        for key in sorted(set(parameters) - set(kinds.get(kind, parameters))):
            problems.append(f"config.json: unknown key '{section}.{key}' (value {parameters[key]!r}) for {model}.")
        return cls(base=outer if inner is None else inner, kind=kind, parameters=parameters), problems


def _section(hf: Mapping[str, Any]) -> tuple[str, Mapping[str, Any], list[str]]:
    """Which of the two keys describes the positions, and what it says; both may, when they agree."""
    used = [key for key in ("rope_parameters", "rope_scaling") if hf.get(key) is not None]
    wrong = [key for key in used if not isinstance(hf[key], Mapping)]
    problems = [f"config.json: {key} must be an object or null, got {hf[key]!r}." for key in wrong]
    if not used or problems:
        return "rope_scaling", {}, problems
    if len({str((_kind(hf[key]), sorted(_parameters(hf[key]).items()))) for key in used}) > 1:
        problems.append("config.json: rope_parameters contradicts rope_scaling; remove the one that is wrong.")
    return used[0], hf[used[0]], problems


def _kind(given: Mapping[str, Any]) -> str:
    kind = given.get("rope_type", given.get("type", "default"))
    return "default" if kind == "mrope" else kind  # sections are a matter of position ids, not of frequencies


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in given.items() if key not in NAMES}


def mrope_section(parameters: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Rotated pairs for time, height and width, or None for ordinary positions."""
    given = parameters.get("mrope_section")
    return None if given is None else tuple(given)


def mrope_written(section: tuple[int, ...] | None, *, interleaved: bool | None = None) -> dict[str, Any] | None:
    """The `rope_scaling` of a released file: null, or the sections. `interleaved=None`: a family that never is."""
    if section is None:
        return None
    more = {} if interleaved is None else {"mrope_interleaved": interleaved}
    return {**more, "mrope_section": list(section), "rope_type": "default"}


def rotary_share(hf: Mapping[str, Any], rope: Rope, default: float) -> tuple[Any, list[str]]:
    """Share of a head that is rotated, in either spelling, and the problem if they contradict each other; `default` is
    what transformers takes where a file is silent."""
    outer, inner = hf.get("partial_rotary_factor"), rope.parameters.get("partial_rotary_factor")
    if outer is not None and inner is not None and outer != inner:
        return outer, [
            f"config.json: partial_rotary_factor={outer!r} contradicts the {inner!r} beside rope_theta; remove the "
            "one that is wrong."
        ]
    found = outer if inner is None else inner
    return default if found is None else found, []
