"""The same bytes with any number of workers, and after a kill; shards of another conversion never mix in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from loongforge.core.errors import DataError
from loongforge.data.cli import command
from loongforge.data.convert import run
from loongforge.data.convert.options import ConvertOptions, part_of
from loongforge.data.engine import Local
from loongforge.data.shards import read_index, shards_of

COMMAND = "import sys; from loongforge.core.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def many(rows: list[dict[str, Any]], tmp_path: Path) -> Path:
    """The rows twenty times over, as a list."""
    made = [{**row, "id": f"{time_}-{place}"} for time_ in range(20) for place, row in enumerate(rows)]
    (tmp_path / "many.json").write_text(json.dumps(made, ensure_ascii=False))
    return tmp_path / "many.json"


def test_workers_and_spelling_change_nothing(rows, convert, content, tmp_path: Path) -> None:
    first = content(convert(rows, "--maxcount=7", "--split=80,20", into="one"))
    assert len([name for name in first if name.endswith(".tar")]) > 4
    file = tmp_path / "rows.jsonl"
    dashed = ["--max-bad=5", "--split", "80,20", "--maxcount", "7", "--resume", "--sample-type=multi_mix_qa"]
    assert content(convert(file, *dashed, into="two", workers=2)) == first
    sizes = [len(data) for name, data in first.items() if name.endswith(".tar")]
    limited = content(convert(file, f"--maxsize={max(sizes) // 2}", into="three"))
    assert all(len(data) <= max(sizes) // 2 for name, data in limited.items() if name.endswith(".tar"))


def test_tasks_of_an_engine_write_the_same_bytes(rows, convert, content, monkeypatch, tmp_path: Path) -> None:
    expected = content(convert(rows, "--maxcount=7", into="one"))
    monkeypatch.chdir(tmp_path)  # tasks have working directories of their own
    monkeypatch.setattr(run, "open_engine", lambda name, workers: Local(workers=2))
    assert content(convert(tmp_path / "rows.jsonl", "--maxcount=7", "--engine=ray", into="two")) == expected


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install 'loongforge-data[ray]'")
@pytest.mark.filterwarnings("ignore")  # Ray's own, of files and processes it leaves to the operating system
def test_a_cluster_writes_the_same_bytes(rows, convert, content, tmp_path: Path) -> None:
    expected = content(convert(rows, "--maxcount=7", "--split=80,20", into="one"))
    words = ("--maxcount=7", "--split=80,20", "--engine=ray")
    assert content(convert(tmp_path / "rows.jsonl", *words, into="two")) == expected


def test_a_killed_conversion_goes_on_to_the_same_bytes(many: Path, convert, content, media: Path, tmp_path) -> None:
    expected = content(convert(many, "--maxcount=40", into="whole"))
    words = ["data", "convert-to-webdataset", "--json_file", str(many), "--output_dir", str(tmp_path / "killed")]
    words += ["--image_dir", str(media / "pictures"), "--video_dir", str(media / "films")]
    words += ["--sample_type", "multi_mix_qa", "--maxcount", "40", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *words], start_new_session=True)
    killed = tmp_path / "killed"
    while not list(killed.glob("*.tar")) and process.poll() is None:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists(), "it was done before it could be killed"
    kept = {path: path.stat().st_mtime_ns for path in killed.glob("*.tar")}
    records = {path.name for path in (killed / ".loongforge/convert").glob("pretrain-*.json")}
    assert content(convert(many, "--maxcount=40", into="killed")) == expected
    for path, written in kept.items():
        if f"{path.name}.json" in records:
            assert path.stat().st_mtime_ns == written, f"{path.name} was finished, and written again"


def test_what_is_finished_is_not_done_again(rows, convert, content, capsys) -> None:
    out = convert(rows)
    first, before = content(out), (out / "pretrain-000000.tar").stat().st_mtime_ns
    said = capsys.readouterr().out
    assert content(convert(rows)) == first
    assert (out / "pretrain-000000.tar").stat().st_mtime_ns == before
    assert capsys.readouterr().out == said
    (out / "pretrain-000000.tar").unlink()  # a lost shard is written again
    assert content(convert(rows)) == first


def test_shards_of_another_conversion_are_refused(rows, convert, content, tmp_path: Path) -> None:
    """A shorter input does not leave the old shards in the split."""
    out = convert(rows, "--maxcount=5")
    short = rows[:8]
    with pytest.raises(DataError, match=r"another conversion: input was rows.jsonl \(.*now it is rows.jsonl"):
        convert(short, "--maxcount=5")
    fresh = content(convert(short, "--maxcount=5", into="fresh"))
    assert content(convert(short, "--maxcount=5", "--overwrite")) == fresh
    assert [path.name for path in shards_of(out)] == ["pretrain-000000.tar", "pretrain-000001.tar"]
    for flag, name in (
        ("--maxcount=6", "maxcount was 5"),
        ("--key=row", "key was 'id'"),
        ("--split=1,1", "split was None"),
    ):
        flags = [flag] if "maxcount" in flag else ["--maxcount=5", flag]
        with pytest.raises(DataError, match=f"another conversion: {name}"):
            convert(short, *flags)
    (out / "stray.tar").write_bytes(b"")
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"stray\.tar is not of this conversion"):
        convert(short, "--maxcount=5")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "pretrain-0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds shards already \(pretrain-0.tar\), and no record"):
        convert(short, into="foreign")
    assert not (foreign / "manifest.json").exists()


def test_one_conversion_at_a_time(rows, convert, tmp_path: Path) -> None:
    import fcntl

    out = convert(rows)
    with open(out / ".loongforge/convert/lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another conversion writes to"):
            convert(rows)


def test_a_worker_that_dies_is_said(many: Path, convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel ends a process that takes too much memory; here its target does not exist in the child."""
    from loongforge.data.convert import pool

    monkeypatch.setattr(pool, "_serve", os.abort)
    with pytest.raises(DataError, match=r"converting processes ended by force.*goes on from the finished shards"):
        convert(many, "--maxcount=40", workers=2)


def test_shares_of_a_split_are_kept_by_key(tmp_path: Path) -> None:
    made = {"json_file": tmp_path, "image_dir": tmp_path, "video_dir": tmp_path, "sample_type": "vqa"}
    ninety = ConvertOptions(**made, split="90,8,2").shares()
    parts = [part_of(f"key_{number}", ninety) for number in range(20_000)]
    shares = [parts.count(part) / len(parts) for part in ("train", "val", "test")]
    # Three standard deviations of 20,000 draws at a share of 0.9 are 0.0064.
    assert all(abs(share - wanted) < 0.0064 for share, wanted in zip(shares, (0.9, 0.08, 0.02), strict=True))
    assert part_of("any", ConvertOptions(**made, split="0,1").shares()) == "val"
    for wrong in ("a", "1,2,3,4", "-1,2", "0,0", "nan", ""):
        with pytest.raises(DataError, match="give up to three shares"):
            ConvertOptions(**made, split=wrong)


def test_parts_of_a_split_are_disjoint_and_whole(rows, convert) -> None:
    out = convert(rows, "--split=60,30,10")
    keys = {part: {one.key for path in shards_of(out / part) for one in read_index(path)} for part in ("train", "val")}
    manifest = json.loads((out / "manifest.json").read_text())
    assert sum(manifest["parts"].values()) == 41
    assert not keys["train"] & keys["val"]
    assert {part: len(found) for part, found in keys.items()} == {part: manifest["parts"][part] for part in keys}


def test_usage(rows, convert, tmp_path: Path, capsys) -> None:
    for flags, reason in (
        (["--image_dir", "nowhere"], "--image_dir: no folder nowhere"),
        (["--maxcount=0"], "--maxcount 0 --maxsize 3000000000: both must be 1 or more"),
        (["--resume", "--overwrite"], "give one of the two"),
    ):
        with pytest.raises(DataError, match=reason):
            convert(rows, *flags)
    (tmp_path / "rows.csv").write_text("")
    with pytest.raises(DataError, match=r"rows.csv: .json \(a list of rows\), .jsonl and .parquet"):
        convert(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="no file"):
        convert(tmp_path / "absent.json")
    with pytest.raises(SystemExit):
        command(["convert-to-webdataset", "--help"])
    assert "--sample_type multi_mix_qa --media mix" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        convert(rows, "--sample_type=feature_vqa")
    assert "choose from" in capsys.readouterr().err
