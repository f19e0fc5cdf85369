"""A conversion from the first row to the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from loongforge.core.errors import DataError
from loongforge.data.convert.account import Account
from loongforge.data.convert.energon import write_metadata
from loongforge.data.convert.folder import MANIFEST, REPORT, claimed, finished, tidy
from loongforge.data.convert.options import PARTS, ConvertOptions
from loongforge.data.convert.plan import plan_shards
from loongforge.data.convert.pool import write_on, write_shards
from loongforge.data.convert.rows import Row, read_rows
from loongforge.data.convert.shard import Finding, ShardTask, write_text
from loongforge.data.engine import open_engine
from loongforge.data.progress import progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Conduct:
    """How to convert; no byte of a shard depends on it."""

    workers: int
    engine: Literal["local", "ray"] = "local"
    on_bad: Literal["error", "skip"] = "error"
    max_bad: int = 1000
    """Rows that may be left out before the conversion stops."""
    overwrite: bool = False


def convert(options: ConvertOptions, folder: Path, how: Conduct) -> dict[str, Any]:
    """Write the shards, the manifest, the report and Energon's metadata; returns the manifest.

    An unfinished conversion of the same input and options goes on where it was. `DataError` names rows that cannot be
    used, unless they may be skipped: `report.jsonl` has them all then, and the shards are not published.
    """
    identity = options.identity()
    with claimed(folder, identity, overwrite=how.overwrite):
        before = _published(folder)
        if before is not None and (how.on_bad == "skip" or not before["totals"]["skipped"]):
            return before
        (folder / MANIFEST).unlink(missing_ok=True)
        account = Account(file=options.json_file, folder=folder, max_bad=how.max_bad)
        _run(account, options, how)
        account.report()
        totals = account.totals()
        if account.skipped and how.on_bad == "error":
            raise DataError(
                *account.first(),
                f"{totals['skipped']} of {totals['rows']} rows cannot be used; {folder / REPORT} names them all. Mend "
                "them, or say --on-bad skip to leave them out: finished shards are kept.",
            )
        if not totals["written"]:
            raise DataError(f"{options.json_file}: none of {totals['rows']} rows can be used.", *account.first())
        return _publish(account, options, identity, totals)


def _run(account: Account, options: ConvertOptions, how: Conduct) -> None:
    """Plan, take up what is finished, write the rest."""
    with progress(f"converting {options.json_file.name}", os.path.getsize(options.json_file)) as advance:

        def leave_out(row: Row, finding: Finding) -> None:
            account.leave_out(finding)
            advance(row.size)

        def unfinished(tasks: Iterator[ShardTask]) -> Iterator[ShardTask]:
            for task in tasks:
                record = finished(task)
                if record is None or (how.on_bad == "error" and record.samples < record.rows):
                    yield task  # files of a shard that left rows out may have been mended
                    continue
                account.add(record)
                advance(sum(sample.read for sample in task.samples))

        rows = account.count(read_rows(options.json_file))
        tasks = unfinished(plan_shards(rows, options, account.folder, leave_out))
        written = (
            write_shards(tasks, how.workers, advance)
            if how.engine == "local"
            else write_on(open_engine(how.engine, how.workers), tasks, advance)
        )
        with closing(written) as records:  # closing ends the processes
            for record in records:
                account.add(record)


def _publish(
    account: Account, options: ConvertOptions, identity: dict[str, Any], totals: dict[str, int]
) -> dict[str, Any]:
    records = account.shards()
    tidy(account.folder, records)
    manifest = {
        "options": {name: value for name, value in identity.items() if name != "input"},
        "input": identity["input"],
        "totals": totals,
        "parts": {part: sum(one.samples for one in records if one.part == part) for part in PARTS},
        "shards": [{name: value for name, value in asdict(one).items() if name != "findings"} for one in records],
    }
    write_metadata(account.folder, options.sample_type, records)
    write_text(account.folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _published(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished conversion; None when there is none or a shard of it is gone."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{folder / MANIFEST} is damaged ({error}): --overwrite converts everything again.") from error
    paths = [(folder / shard["name"], shard["bytes"]) for shard in manifest["shards"]]
    whole = all(path.is_file() and path.stat().st_size == size for path, size in paths)
    return manifest if whole else None
