"""What a word after `--data-path` is: a weight, or a path. Imports nothing: the command line asks before anything."""

from __future__ import annotations

from collections.abc import Iterable


def weight_of(word: str) -> float | None:
    """The number that a word is, as `0.7`, `1e-1` or `-1`; None for a path, also one called `inf` or `1_000`."""
    if not any(letter.isdigit() for letter in word) or "_" in word:
        return None
    try:
        return float(word)
    except ValueError:
        return None


def without_weights(words: Iterable[str]) -> list[str]:
    """The paths among the words."""
    return [word for word in words if weight_of(word) is None]
