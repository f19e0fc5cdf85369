"""Numbers of items, costs or lengths, as a caller gives them, checked and made exact."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from loongforge.core.errors import DataError

_BITS = 60
"""Costs are scaled so that all of them together stay below 2^60, and twice a load still fits int64."""


class ItemError(DataError, ValueError):
    """Costs, lengths or limits that nothing can be planned with; the message names the item by its number from 0."""


def numbers(values: ArrayLike, what: str, *, dims: int = 1) -> np.ndarray:
    """`values` as int64 or float64 of at most `dims` dimensions; `ItemError` unless all are finite and 0 or more."""
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "biuf" or (array.dtype.kind == "u" and array.size and array.max() > 2**62):
            array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ItemError(_first_stranger(values, what) or f"{what} must be a list of numbers: {error}.") from None
    if not 1 <= array.ndim <= dims or 0 in array.shape[1:]:
        raise ItemError(f"{what} have the shape {array.shape}: give one number for each item.")
    array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
    if array.size and not (array.min() >= 0 and np.isfinite(array.max())):
        wrong = np.argwhere(~((array >= 0) & np.isfinite(array)))[0].tolist()
        raise ItemError(
            f"{what}: item {wrong[0]} has {array[tuple(wrong)].item()!r}: every number must be finite and 0 or more."
        )
    return array


def whole_numbers(values: ArrayLike, what: str) -> np.ndarray:
    """As `numbers`, int64 `[items]`; `ItemError` for one that is not whole."""
    array = numbers(values, what)
    if array.dtype.kind == "f":
        if (broken := np.flatnonzero((array != np.floor(array)) | (array >= 2.0**62))).size:
            raise ItemError(f"{what}: item {broken[0]} has {array[broken[0]].item()!r}: it must be a whole number.")
        array = array.astype(np.int64)
    return array


def limit(value: Any, what: str) -> int:
    """`value` as an int; `ItemError` unless it is a whole number, 1 or more."""
    try:
        number = operator.index(value)
    except TypeError:
        number = int(value) if isinstance(value, float) and value.is_integer() else 0
    if number < 1:
        raise ItemError(f"{what}={value!r} must be a whole number, 1 or more.")
    return number


def exact(values: np.ndarray) -> np.ndarray:
    """Costs as int64 of the same shape, in a unit that is a power of two, so that loads add up alike in any order.

    Integers that fit stay as they are. For n items the unit is at most 2^-58 n times the greatest cost.
    """
    if values.size == 0:
        return values.astype(np.int64)
    exponent = int(np.frexp(float(values.max()))[1]) + values.size.bit_length()
    if values.dtype.kind == "i" and exponent <= _BITS:
        return values
    return np.rint(np.ldexp(values.astype(np.float64), _BITS - exponent)).astype(np.int64)


def descending(values: np.ndarray) -> np.ndarray:
    """Numbers of the items, int64, those with most first and equal ones by number."""
    if values.size and (most := int(values.max())) < 2**16:
        return np.argsort((most - values).astype(np.uint16), kind="stable")  # numpy sorts 16 bits ten times as fast
    return np.argsort(-values, kind="stable")


def sliced(items: np.ndarray, ends: np.ndarray) -> list[list[int]]:
    """Group `g` is `items[ends[g]:ends[g + 1]]`."""
    flat, borders = items.tolist(), ends.tolist()
    return [flat[start:end] for start, end in itertools.pairwise(borders)]


def spans(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers `first[i]` to `first[i] + counts[i] - 1` of every i, end to end, int64."""
    return np.arange(int(counts.sum())) + np.repeat(first - (np.cumsum(counts) - counts), counts)


def gathered(
    owners: np.ndarray, rows_of: Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of items that lie with several owners: how many each item has, and all of them in the order of the items.

    `rows_of(owner, which)` answers the same for the items `which` of one owner.
    """
    counts = np.zeros(len(owners), dtype=np.int64)
    parts: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for owner in np.unique(owners).tolist():
        which = np.flatnonzero(owners == owner)
        counts[which], rows = rows_of(owner, which)
        parts.append(rows)
        places.append(np.repeat(which, counts[which]))
    return counts, np.concatenate(parts)[np.argsort(np.concatenate(places), kind="stable")]


def _first_stranger(values: Any, what: str) -> str | None:
    """Names the first of `values` that is no number."""
    for number, value in enumerate(values if isinstance(values, list | tuple) else ()):
        try:
            float(value)
        except (TypeError, ValueError, OverflowError):
            return f"{what}: item {number} has {value!r}: it must be a number."
    return None
