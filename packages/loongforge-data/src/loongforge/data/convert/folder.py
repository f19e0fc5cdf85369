"""The output folder of a conversion: whose it is, and what of it is finished."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loongforge.core.errors import DataError
from loongforge.data.convert.energon import META
from loongforge.data.convert.options import PARTS
from loongforge.data.convert.plan import PREFIX
from loongforge.data.convert.shard import ShardRecord, ShardTask, record_path, write_text

MANIFEST = "manifest.json"
REPORT = "report.jsonl"
STATE = Path(".loongforge") / "convert"


@contextmanager
def claimed(folder: Path, identity: dict[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Hold the folder for one conversion, which is new or has the same identity as the one that began there.

    `DataError` names the first option that differs, shards that are not of this command, or another process.
    """
    state = folder / STATE
    try:
        state.mkdir(parents=True, exist_ok=True)
        lock = open(state / "lock", "ab")  # noqa: SIM115  closed below; the lock lives as long as it is open
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror or error}. Give another --output_dir.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another conversion writes to {folder} now: wait for it to end.") from error
        except OSError as error:
            raise DataError(
                f"cannot lock {folder}: {error}. Give an --output_dir on a file system with locks."
            ) from error
        if overwrite:
            _clear(folder)
        _claim(folder, identity)
        yield


def finished(task: ShardTask) -> ShardRecord | None:
    """The record of a shard that an earlier run finished; `DataError` when it was made of other files."""
    record = ShardRecord.read(record_path(task.folder, task.name))
    if record is None:
        return None
    if record.digest != task.digest:
        raise DataError(
            f"{task.folder / task.name} was written from other files: an image or video has another size or place by "
            "now. --overwrite converts everything again."
        )
    path = task.folder / task.name
    if not record.samples:
        return record
    there = path.is_file() and path.stat().st_size == record.bytes and path.with_name(f"{path.name}.idx").is_file()
    return record if there else None


def tidy(folder: Path, records: Iterable[ShardRecord]) -> None:
    """Take away drafts of killed runs; `DataError` names an archive that is none of the conversion's."""
    ours = {folder / record.name for record in records if record.samples}
    for place in _places(folder):
        for draft in place.glob("*.part-*"):
            draft.unlink(missing_ok=True)
        for archive in sorted(place.glob("*.tar")):
            if archive not in ours:
                raise DataError(f"{archive} is not of this conversion: move it away and start the command again.")
    for draft in (folder / STATE).glob("*.part-*"):
        draft.unlink(missing_ok=True)


def _claim(folder: Path, identity: dict[str, Any]) -> None:
    job = folder / STATE / "job.json"
    if not job.exists():
        for place in _places(folder):
            if strays := sorted(place.glob("*.tar")):
                raise DataError(
                    f"{folder} holds shards already ({strays[0].name}), and no record of how they were made: give an "
                    "empty --output_dir, or --overwrite to replace shards named "
                    f"{PREFIX}-NUMBER.tar."
                )
        write_text(job, json.dumps(identity, indent=1))
        return
    try:
        before: dict[str, Any] = json.loads(job.read_text())
    except ValueError as error:
        raise DataError(f"{job} is damaged ({error}): --overwrite converts everything again.") from error
    for name in dict.fromkeys([*identity, *before]):
        if identity.get(name) != before.get(name):
            raise DataError(
                f"{folder} holds shards of another conversion: {name} was {_short(before.get(name))}, now it is "
                f"{_short(identity.get(name))}. Give another --output_dir, or --overwrite to replace them."
            )


def _short(value: Any) -> str:
    if isinstance(value, dict):  # the input
        return f"{value['name']} ({value['bytes']} bytes, sha256 {value['sha256'][:12]})"
    return repr(value)


def _clear(folder: Path) -> None:
    """Take away what a conversion writes, and nothing else."""
    (folder / MANIFEST).unlink(missing_ok=True)  # first: shards without it are not complete
    (folder / REPORT).unlink(missing_ok=True)
    for place in _places(folder):
        for path in place.glob(f"{PREFIX}-[0-9]*.tar*"):
            path.unlink()
    shutil.rmtree(folder / META, ignore_errors=True)
    for record in (folder / STATE).glob("*.json"):
        record.unlink()


def _places(folder: Path) -> list[Path]:
    """Folders in which shards of a conversion may lie."""
    return [folder, *(folder / part for part in PARTS)]
