"""Text files to `.bin/.idx`: parts are tokenised by an engine, written in order by this process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loongforge.core.errors import DataError
from loongforge.data.blend import PARTS, shares_of, split_range
from loongforge.data.draft import Draft
from loongforge.data.engine import Engine
from loongforge.data.indexed import token_type
from loongforge.data.parts import PART_BYTES, Part, PartAnswer, PartEncoder, TextRules, parts_of
from loongforge.data.progress import progress
from loongforge.data.rows import BadRows

_FORMAT = 1
"""Raised when drafts of an earlier version must not be continued."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a new `.bin/.idx` pair holds."""

    prefix: str
    field: str
    part: str
    """`train`, `valid` or `test`; empty without a split."""
    documents: int
    tokens: int


@dataclass(slots=True, kw_only=True)
class _Place:
    """How far a file is, so that rows are counted over its parts."""

    rows: int = 0
    documents: int = 0
    blank: list[int] = field(default_factory=list)
    """Empty lines that a row may follow yet; at the end of a file they are no mistake."""

    def take(self, part: Part, answer: PartAnswer, bad: BadRows) -> None:
        """Count one part; `DataError` at the end of a file with bad rows or with none at all."""
        found = list(answer.bad)
        if answer.last:
            blank = [*(line - self.rows for line in self.blank), *(line for line in answer.blank if line < answer.last)]
            found += [(line, "an empty line where a JSON object should be.") for line in blank]
            self.blank.clear()
        for number, reason in sorted(found):
            bad.add(part.path, self.rows + number, reason)
        self.blank += [self.rows + line for line in answer.blank if line > answer.last]
        self.rows += answer.rows
        self.documents += len(answer.lengths[0])
        if part.ends:
            bad.check()
            if not self.documents:
                raise DataError(f"{part.path} holds no row.")
            self.rows = self.documents = 0
            self.blank = []


def write_documents(
    paths: Sequence[Path], prefixes: Sequence[str], rules: TextRules, engine: Engine, *, split: str | None = None
) -> list[Written]:
    """Tokenise `.jsonl` and `.parquet` (one document per row) and `.txt` (one document) files in order.

    Writes a pair `prefix.bin/.idx` for each field of the rules, or with `split`, such as `98,1,1`, the pairs
    `prefix_train`, `prefix_valid` and `prefix_test`: the documents that training takes for each with the same --split
    over the whole. A run that is killed leaves `prefixes[0].partial`; the same call goes on there and ends with the
    same bytes. `DataError` names bad rows by file and line; then nothing is left behind.
    """
    assert len(prefixes) == len(rules.fields), "one pair for each field"
    parts = list(parts_of(paths))
    draft = Draft(prefixes[0], len(prefixes), token_type(rules.choice.vocab_size), _signature(paths, rules))
    try:
        _tokenise(parts, draft, rules, engine)
        written: list[Written] = []
        for number, (prefix, name) in enumerate(zip(prefixes, rules.fields, strict=True)):
            lengths = draft.lengths(number)
            targets = _targets(prefix, split, len(lengths))
            draft.publish(number, [target[1:] for target in targets])
            written += [
                Written(
                    prefix=target, field=name, part=part, documents=last - first, tokens=int(lengths[first:last].sum())
                )
                for part, target, first, last in targets
            ]
    except BaseException:
        draft.close()
        raise
    draft.discard()
    return written


def _tokenise(parts: list[Part], draft: Draft, rules: TextRules, engine: Engine) -> None:
    """Add the parts that the draft does not have."""
    bad, place = BadRows(), _Place(**draft.place)
    label = f"tokenising {Path(parts[0].path).name}" if len({part.path for part in parts}) == 1 else "tokenising"
    rest = parts[draft.parts :]
    with progress(label, sum(part.size for part in parts)) as advance:
        advance(sum(part.size for part in parts[: draft.parts]))
        answers = engine.map(PartEncoder, (rules, engine.threads), rest)
        sound = True
        for part, answer in zip(rest, answers, strict=True):
            try:
                place.take(part, answer, bad)
            except DataError:
                draft.discard()
                raise
            sound = sound and not answer.bad and bad.sound
            if sound:
                draft.add(answer.tokens, answer.lengths, asdict(place))
            advance(part.size)


def target_prefixes(prefix: str, split: str | None) -> list[str]:
    """Prefixes that `write_documents` writes for `prefix`; parts with a share of 0 are not written."""
    return [target for _, target, _, _ in _targets(prefix, split, 1 << 40)]


def _targets(prefix: str, split: str | None, documents: int) -> list[tuple[str, str, int, int]]:
    """Part, prefix, first and last-plus-one document of every pair."""
    if split is None:
        return [("", prefix, 0, documents)]
    asked = [part for part, share in zip(PARTS, shares_of(split), strict=True) if share]
    return [(part, f"{prefix}_{part}", *split_range(split, part, documents)) for part in asked]


def _signature(paths: Sequence[Path], rules: TextRules) -> str:
    """A hash of everything that decides what is written."""
    stamps = [(os.path.realpath(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    decisive = (_FORMAT, PART_BYTES, stamps, rules.choice.open().identity(), rules.choice.vocab_size)
    return hashlib.blake2b(repr((*decisive, rules.fields, rules.append_eod)).encode(), digest_size=16).hexdigest()
