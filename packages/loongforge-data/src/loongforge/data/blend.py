"""Several corpora drawn by weight, in an order that any length of run shares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loongforge.core.data.paths import weight_of
from loongforge.core.errors import DataError

PARTS = ("train", "valid", "test")
PERIOD = 1 << 18
"""Samples after which the pattern of corpora repeats; shares are exact to one sample in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathGroup:
    """Paths that form one corpus, and its weight in the blend."""

    paths: tuple[str, ...]
    weight: float


def parse_paths(paths: tuple[str, ...]) -> list[PathGroup]:
    """Groups of `0.3 a.jsonl 0.7 prefix`; paths without weights are one corpus, one after the other.

    `DataError` when there is no path or weights and paths do not alternate.
    """
    if not paths:
        raise DataError("no data: give --data-path FILE.jsonl, a .bin/.idx prefix, or `WEIGHT PATH WEIGHT PATH ...`.")
    if weight_of(paths[0]) is None:
        stray = [entry for entry in paths if weight_of(entry) is not None]
        if stray:
            raise DataError(
                f"--data-path {' '.join(paths)!r}: the weight {stray[0]!r} has no weight before the first path."
            )
        return [PathGroup(paths=paths, weight=1.0)]
    groups: list[PathGroup] = []
    for position in range(0, len(paths), 2):
        weight = weight_of(paths[position])
        path = paths[position + 1] if position + 1 < len(paths) else None
        if weight is None or path is None or weight_of(path) is not None:
            raise DataError(f"--data-path {' '.join(paths)!r}: weights and paths must alternate, `0.3 A 0.7 B`.")
        if not 0 < weight < float("inf"):
            raise DataError(
                f"--data-path {' '.join(paths)!r}: the weight of {path!r} is {weight!r}, it must be above 0."
            )
        groups.append(PathGroup(paths=(path,), weight=weight))
    return groups


def told_epochs(paths: list[PathGroup], epochs: list[float]) -> float | dict[str, float]:
    """Epochs for a report: one number, or one of every corpus by its path."""
    if len(paths) == 1:
        return round(epochs[0], 3)
    return {group.paths[0]: round(count, 3) for group, count in zip(paths, epochs, strict=True)}


class Blend:
    """Which corpus gives sample `i`, and how many it gave before: a fixed pattern of `PERIOD` samples, repeated.

    Depends on the weights alone, so that a longer run begins exactly as a shorter one.
    """

    def __init__(self, weights: list[float]) -> None:
        self._quota = _apportion(weights)
        # Even spread: draw k of a corpus with quota q belongs at (k + 1/2) / q of the period.
        owner = np.repeat(np.arange(len(weights)), self._quota)
        rank = np.concatenate([np.arange(quota) for quota in self._quota])
        pattern = np.argsort((rank + 0.5) / self._quota[owner], kind="stable")
        self._owner, self._rank = owner[pattern].astype(np.int32), rank[pattern].astype(np.int32)

    def __getitem__(self, index: int) -> tuple[int, int]:
        """`(corpus, number of the sample within the corpus)` for sample `index`."""
        period, place = divmod(index, PERIOD)
        owner = int(self._owner[place])
        return owner, period * int(self._quota[owner]) + int(self._rank[place])

    def many(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The same for several samples, int64 `[samples]` each."""
        period, place = np.divmod(numbers, PERIOD)
        owner = self._owner[place]
        return owner.astype(np.int64), period * self._quota[owner] + self._rank[place]

    def drawn(self, samples: int) -> list[int]:
        """How many of the first `samples` each corpus gives."""
        periods, rest = divmod(samples, PERIOD)
        begun = np.bincount(self._owner[:rest], minlength=len(self._quota))
        return (periods * self._quota + begun).tolist()


def _apportion(weights: list[float]) -> np.ndarray:
    """Whole shares of `PERIOD`, int64, at least one each, by largest remainder."""
    exact = np.array(weights) / sum(weights) * PERIOD
    quota = np.maximum(np.floor(exact), 1).astype(np.int64)
    while (rest := PERIOD - int(quota.sum())) != 0:
        lacking = exact - quota if rest > 0 else np.where(quota > 1, quota - exact, -np.inf)
        quota[int(np.argmax(lacking))] += 1 if rest > 0 else -1
    return quota


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def shares_of(split: str) -> list[float]:
    """Shares of train, valid and test in `969,30,1`; those left out are 0. `DataError` for a malformed split."""
    shares = [_number(share) for share in split.split(",")]
    if not 0 < len(shares) <= 3 or any(share is None or share < 0 for share in shares):
        raise DataError(f"--split {split!r}: give up to three shares that are not negative, as in 969,30,1.")
    filled = [share or 0.0 for share in shares] + [0.0] * (3 - len(shares))
    if not 0 < sum(filled) < float("inf"):
        raise DataError(f"--split {split!r}: at least one share must be above 0, and none infinite.")
    return filled


def split_range(split: str | None, part: str, count: int) -> tuple[int, int]:
    """First and last-plus-one of `count` documents that belong to `part`, by the shares `969,30,1`.

    Without a split everything belongs to the part asked for. `DataError` for a malformed split or an empty part.
    """
    assert part in PARTS, f"unknown part {part!r}"
    if split is None:
        return 0, count
    filled = shares_of(split)
    borders = [round(count * sum(filled[:number]) / sum(filled)) for number in range(4)]
    first, last = borders[PARTS.index(part)], borders[PARTS.index(part) + 1]
    if first == last:
        raise DataError(
            f"--split {split!r} leaves no document for {part} out of {count}: raise its share, or give "
            f"{'--valid-data-path' if part == 'valid' else 'more data'}."
        )
    return first, last
