"""What becomes of a conversation that is longer than a sequence. No turn is ever cut: whole ones stay or go."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

from loongforge.data.accounts import TOO_LONG, Answer, Done, Note
from loongforge.data.formats import Conversation
from loongforge.data.rows import Place

_HEAD = ("system", "developer")
"""Who speaks before a conversation begins; every piece of it keeps what they say."""
Pieces = list[list[int]]
"""Conversations made of one, each as the numbers of its messages."""


class Encoder[E](Protocol):
    """Makes conversations of some messages of one row."""

    def encode(self, numbers: list[int]) -> E:
        """Tokens and mask of the conversation made of these messages."""
        ...

    def length(self, numbers: list[int]) -> int:
        """Its tokens, which costs less."""
        ...

    def size(self, one: E) -> int:
        """Tokens of one that is encoded."""
        ...

    def unfit(self, one: E) -> str | None:
        """The rule by which one of any length cannot be trained on; None when it can."""
        ...


def settle[E](
    answer: Answer[E], place: Place, said: Conversation, row: Encoder[E], *, policy: str, room: int, hint: str
) -> None:
    """Put into `answer` what becomes of one row: conversations of at most `room` tokens, and a note if it is changed.

    A longer one becomes none (`drop`), its beginning up to the last answer that fits (`truncate`), several (`split`),
    or a `ValueError` (`error`) that ends with `hint`.
    """
    whole = row.encode(list(range(len(said.messages))))
    tokens = row.size(whole)
    if tokens > room and policy == "error":
        raise ValueError(f"{tokens} tokens, --seq-length {room - 1} holds {room} ({hint}).")
    answer.rows += 1
    answer.forms[said.form] += 1
    done: Done = "truncated" if policy == "truncate" else "split"
    kept: list[E] = []
    used: set[int] = set()
    rule = TOO_LONG
    if tokens <= room:
        rule = row.unfit(whole)
        if rule is None:
            answer.kept.append(whole)
            answer.places.append(place)
            return
    else:
        for piece in _pieces([message["role"] for message in said.messages], policy, row.length, room):
            one = row.encode(piece)
            unfit = row.unfit(one)
            if unfit is None:
                kept.append(one)
                used.update(piece)
    answer.kept += kept
    answer.places += [place] * len(kept)
    answer.notes.append(
        Note(
            path=place.path,
            row=place.row,
            done=done if kept else "dropped",
            rule=rule,
            tokens=tokens,
            pieces=len(kept),
            lost_messages=len(said.messages) - len(used),
        )
    )


def _pieces(roles: list[str], policy: str, length: Callable[[list[int]], int], room: int) -> Pieces:
    if policy == "truncate":
        return _beginning(roles, list(range(len(roles))), length, room)
    assert policy in ("drop", "split"), f"no policy {policy!r}"
    return _split(roles, length, room) if policy == "split" else []


def _beginning(roles: list[str], numbers: list[int], length: Callable[[list[int]], int], room: int) -> Pieces:
    """The messages up to the last assistant turn that fits, as the only piece; none when none fits."""
    for count in range(len(numbers), 0, -1):
        if roles[numbers[count - 1]] == "assistant" and length(numbers[:count]) <= room:
            return [numbers[:count]]
    return []


def _split(roles: list[str], length: Callable[[list[int]], int], room: int) -> Pieces:
    """As many exchanges at a time as fit, behind what the system says first.

    An exchange is what a user says and all that follows until he speaks again: calls of tools stay with their results.
    One that does not fit alone is cut after the last answer that does.
    """
    begin = next((number for number, role in enumerate(roles) if role not in _HEAD), len(roles))
    starts = [n for n in range(begin, len(roles)) if n == begin or (roles[n] == "user" and roles[n - 1] != "user")]
    pieces: Pieces = []
    piece: list[int] = []
    for start, end in pairwise([*starts, len(roles)]):
        exchange = list(range(start, end))
        if piece and length([*piece, *exchange]) <= room:
            piece += exchange
            continue
        pieces += [piece] if piece else []
        piece = [*range(begin), *exchange]
        if length(piece) > room:
            pieces += _beginning(roles, piece, length, room)
            piece = []
    return [*pieces, piece] if piece else pieces
