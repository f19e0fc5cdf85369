"""Which row goes into which shard: a function of the input and the options, whatever the files turn out to hold."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loongforge.data.convert.options import PARTS, ConvertOptions, part_of
from loongforge.data.convert.rows import Row
from loongforge.data.convert.sample import Sample, key_of, sample_of
from loongforge.data.convert.shard import Finding, ShardTask, archive_size

PREFIX = "pretrain"


@dataclass(slots=True, kw_only=True)
class _Open:
    """The shard of a part that is being filled."""

    samples: list[Sample] = field(default_factory=list)
    size: int = 0
    number: int = 0


def plan_shards(
    rows: Iterable[Row], options: ConvertOptions, folder: Path, leave_out: Callable[[Row, Finding], None]
) -> Iterator[ShardTask]:
    """Shards in the order they are full. A row that cannot become a sample goes to `leave_out`.

    Rows whose files turn out to be damaged later stay counted here, so that no border depends on them.
    """
    open_shards = {part: _Open() for part in PARTS}
    seen: set[int] = set()
    shares = options.shares()

    def close(part: str) -> ShardTask:
        shard = open_shards[part]
        name = f"{options.folder(part)}{PREFIX}-{shard.number:06d}.tar"
        open_shards[part] = _Open(number=shard.number + 1)
        return ShardTask(folder=folder, name=name, part=part, samples=tuple(shard.samples))

    for row in rows:
        key = key_of(row, options)
        try:
            sample = sample_of(row, options)
            _once(key, seen)
        except ValueError as error:
            leave_out(row, Finding(row=row.number, line=row.line, key=key, outcome="skipped", reason=str(error)))
            continue
        part = part_of(key, shares)
        shard = open_shards[part]
        if shard.samples and (
            len(shard.samples) >= options.maxcount or archive_size(shard.size + sample.size) > options.maxsize
        ):
            yield close(part)
            shard = open_shards[part]
        shard.samples.append(sample)
        shard.size += sample.size
    for part in PARTS:
        if open_shards[part].samples:
            yield close(part)


def _once(key: str, seen: set[int]) -> None:
    """Keys by 8 bytes of their hash: a hundred million of them collide once in four thousand conversions."""
    known = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())
    if known in seen:
        raise ValueError(f"key {key!r} comes twice; --key row numbers samples instead.")
    seen.add(known)
