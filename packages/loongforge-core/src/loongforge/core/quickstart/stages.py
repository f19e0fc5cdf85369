"""Stages that are done once: a rerun takes up the finished ones and goes on with the others."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Facts = dict[str, Any]
"""What a stage found out; plain JSON values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One stage as its file has it."""

    name: str
    key: str
    """Hash of everything the stage depends on, the stages before it included."""
    finished: bool = False
    seconds: float = 0.0
    """Wall time. Of a stage that was interrupted, the last attempt counts."""
    cpu_seconds: float = 0.0
    """Processor time of this process and of the ones it started."""
    facts: Facts = field(default_factory=Facts)


def told(records: Sequence[Record]) -> dict[str, Any]:
    """Seconds of all stages and of each, with what each found, as plain JSON values."""
    return {
        "seconds": sum(record.seconds for record in records),
        "cpu_seconds": sum(record.cpu_seconds for record in records),
        "stages": {
            record.name: {"seconds": record.seconds, "cpu_seconds": record.cpu_seconds, **record.facts}
            for record in records
        },
    }


class Stages:
    """Runs stages in order and remembers each in `folder/<name>.json`."""

    def __init__(self, folder: Path, announce: Callable[[str, bool], None]) -> None:
        """`announce(title, finished_before)` is called as each stage begins."""
        self.records: list[Record] = []
        self._folder = folder
        self._announce = announce
        self._key = ""

    def run(self, name: str, title: str, depends: Any, owns: Sequence[Path], work: Callable[[], Facts]) -> Facts:
        """The facts of a stage: remembered ones when it was finished with the same `depends`, else those of `work`.

        `owns` is what the stage writes. It is deleted first when it was made with other settings, and kept when the
        stage was only interrupted, so that a training goes on from its own checkpoint.
        """
        self._key = hashlib.blake2b(f"{self._key} {json.dumps(depends)}".encode(), digest_size=8).hexdigest()
        before = self._read(name)
        same = before is not None and before.key == self._key
        if before is not None and same and before.finished and all(path.exists() for path in owns):
            self._announce(title, True)
            self.records.append(before)
            return before.facts
        self._announce(title, False)
        if not same:
            _delete(owns)
        self._write(Record(name=name, key=self._key))
        wall, cpu = time.perf_counter(), _cpu_seconds()
        facts = work()
        record = Record(
            name=name,
            key=self._key,
            finished=True,
            seconds=time.perf_counter() - wall,
            cpu_seconds=_cpu_seconds() - cpu,
            facts=facts,
        )
        self._write(record)
        self.records.append(record)
        return facts

    def facts(self, name: str) -> Facts:
        """The facts of a stage that has run or was taken up before."""
        return next(record.facts for record in self.records if record.name == name)

    def _read(self, name: str) -> Record | None:
        file = self._folder / f"{name}.json"
        if not file.is_file():
            return None
        content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return Record(**content)

    def _write(self, record: Record) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{record.name}.json"
        draft = file.with_suffix(".partial")
        draft.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        draft.replace(file)  # whole or not at all


def _delete(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _cpu_seconds() -> float:
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system
