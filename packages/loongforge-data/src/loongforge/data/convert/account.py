"""The account of a conversion: every row is in a shard or named with its reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from loongforge.core.errors import DataError
from loongforge.data.convert.folder import REPORT
from loongforge.data.convert.options import PARTS
from loongforge.data.convert.rows import Row
from loongforge.data.convert.shard import Finding, ShardRecord, record_path, write_text
from loongforge.data.rows import SHOWN


@dataclass(slots=True, kw_only=True)
class Account:
    """What became of the rows so far."""

    file: Path
    """Their input."""
    folder: Path
    max_bad: int
    """Rows left out that are one too few to stop."""
    rows: int = 0
    records: list[ShardRecord] = field(default_factory=list)
    """Without what they found, of which there may be much: that stays on the disk."""
    skipped: list[Finding] = field(default_factory=list)
    noted: int = 0

    def count(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Pass rows on and count them."""
        for row in rows:
            self.rows += 1
            yield row

    def add(self, record: ShardRecord) -> None:
        """Note a finished shard."""
        self.records.append(replace(record, findings=()))
        for one in record.findings:
            if one.outcome == "skipped":
                self.leave_out(one)
            else:
                self.noted += 1

    def leave_out(self, finding: Finding) -> None:
        """Note a row that is in no shard; `DataError` when the budget for those is spent."""
        self.skipped.append(finding)
        if len(self.skipped) > self.max_bad:
            self.report()
            raise DataError(
                *self.first(),
                f"More than {self.max_bad} rows cannot be used (--max-bad): stopped. {self.folder / REPORT} has them.",
            )

    def shards(self) -> list[ShardRecord]:
        """Records of shards that hold something, by part and name."""
        kept = (record for record in self.records if record.samples)
        return sorted(kept, key=lambda one: (PARTS.index(one.part), one.name))

    def report(self) -> None:
        """Write `report.jsonl`: a line for each row left out, by number, then for each that should be looked at."""
        lines = (json.dumps({"file": self.file.name, **asdict(one)}) + "\n" for one in self._findings())
        write_text(self.folder / REPORT, lines)

    def _findings(self) -> Iterator[Finding]:
        yield from sorted(self.skipped, key=lambda one: one.row)
        for record in self.shards() if self.noted else ():
            whole = ShardRecord.read(record_path(self.folder, record.name))
            yield from (one for one in whole.findings if one.outcome == "noted") if whole else ()

    def first(self) -> list[str]:
        """The first rows left out, as messages."""
        chosen = sorted(self.skipped, key=lambda one: one.row)[:SHOWN]
        return [f"{self.file}:{one.line or f' row {one.row}'}: {one.key}: {one.reason}" for one in chosen]

    def totals(self) -> dict[str, int]:
        """Rows and what they became; `DataError` when one is unaccounted for."""
        totals = {
            "rows": self.rows,
            "written": sum(record.samples for record in self.records),
            "skipped": len(self.skipped),
            "noted": self.noted,
            "images": sum(record.images for record in self.records),
            "videos": sum(record.videos for record in self.records),
            "shards": len(self.shards()),
            "bytes": sum(record.bytes for record in self.records),
        }
        if totals["rows"] != totals["written"] + totals["skipped"]:
            raise DataError(
                f"{self.folder}: {self.rows} rows are not {totals['written']} written + {len(self.skipped)} skipped; "
                "the shards are not complete. This is a mistake of the converter: please report it."
            )
        return totals
