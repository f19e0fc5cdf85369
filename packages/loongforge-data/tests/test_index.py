"""The index of a shard: what it says, when it is built anew, by whom, and what becomes of a damaged archive."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from loongforge.core.data.contract import Clip
from loongforge.core.errors import DataError
from loongforge.data import index as index_module
from loongforge.data.files import Files
from loongforge.data.index import ShardIndex, glance, open_indices
from loongforge.data.shards import write_shards


@pytest.fixture
def shard(pictures: Path) -> Path:
    """Samples with a picture lying down, one that is turned by its EXIF, a video, no picture at all."""
    turned = pictures / "turned.jpg"
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 24)).save(turned, exif=exif)
    samples = {
        "a": {"json": b"{}", "png": (pictures / "3.png").read_bytes()},
        "b/c": {"jpg": turned.read_bytes(), "json": b"[]"},
        "d": {"json": b"1", "0_clip.mp4": (pictures / "clip.mp4").read_bytes()},
        "e": {"json": b"null", "cls": b"7"},
        "f": {"json": b"0", "png": b"no picture"},
    }
    (pictures / "shards").mkdir()
    path = pictures / "shards" / "0.tar"
    with tarfile.open(path, "w") as archive:
        for key, members in samples.items():
            for extension, content in members.items():
                file = pictures / "member"
                file.write_bytes(content)
                archive.add(file, f"{key}.{extension}")
    return path


def opened(shard: Path, cache: Path | None = None) -> ShardIndex:
    return next(iter(open_indices([shard], cache or shard.parent)))


def built(shard: Path) -> Path:
    return shard.parent / ".loongforge" / "index" / f"{shard.name}.npz"


def test_it_says_where_members_lie_and_how_large_pictures_are(shard: Path) -> None:
    index = opened(shard)
    assert [index.key(number) for number in range(len(index))] == ["a", "b/c", "d", "e", "f"]
    extents = {f"{sample.key}.{member.extension}": member.extent for sample in index for member in sample.members}
    assert extents["a.png"] == Clip(frames=1, fps=0.0, height=32, width=31)
    assert extents["b/c.jpg"] == Clip(frames=1, fps=0.0, height=40, width=24), "upright"
    assert extents["d.0_clip.mp4"] == Clip(frames=9, fps=4.0, height=16, width=32)
    assert [name for name, extent in extents.items() if extent is None] == [
        "a.json", "b/c.json", "d.json", "e.json", "e.cls", "f.json", "f.png",
    ]  # fmt: skip
    files = Files()
    with tarfile.open(shard) as archive:
        expected = {header.name: archive.extractfile(header).read() for header in archive}  # pyright: ignore[reportOptionalMemberAccess]
    read = {f"{s.key}.{m.extension}": s.read(m, files) for s in reversed(list(index)) for m in s.members}
    assert read == expected


def test_it_is_read_again_until_the_shard_changes(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list(opened(shard))
    stamp = built(shard).stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "read_index", None)  # nobody may look into the archive
        patch.setattr(index_module, "extent_of", None)
        assert list(opened(shard)) == first
        assert list(glance(shard)) == first
    assert built(shard).stat().st_mtime_ns == stamp
    os.utime(shard, ns=(1, 1))
    assert list(opened(shard)) == first
    assert built(shard).stat().st_mtime_ns != stamp, "another time: another file perhaps"
    for damage in (b"", b"PK damaged", built(shard).read_bytes()[:-70]):
        built(shard).write_bytes(damage)
        assert list(opened(shard)) == first
    other = write_shards([("z", {"json": b"{}"})], shard.parent / "other")[0]
    shard.write_bytes(other.read_bytes())
    assert [sample.key for sample in opened(shard)] == ["z"]


def test_an_index_holds_no_code(shard: Path) -> None:
    opened(shard)
    with np.load(built(shard)) as stored:
        columns = {name: stored[name] for name in stored.files}
    assert not any(values.dtype.hasobject for values in columns.values())
    columns["keys"] = np.array([print], dtype=object)
    np.savez(built(shard), **columns)
    assert next(sample.key for sample in opened(shard)) == "a", "refused, and built anew"


def test_a_look_leaves_nothing_behind(shard: Path) -> None:
    seen = list(glance(shard))
    assert not built(shard).exists()
    assert [sample.key for sample in seen] == ["a", "b/c", "d", "e", "f"]
    assert all(member.extent is None for sample in seen for member in sample.members)


def test_a_folder_that_cannot_be_written_is_indexed_in_the_cache(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: shard.parent not in Path(path).parents)
    assert len(opened(shard, tmp_path / "cache")) == 5
    assert not built(shard).exists()
    (found,) = (tmp_path / "cache").glob("index-*/0.tar.npz")
    stamp = found.stat().st_mtime_ns
    assert len(opened(shard, tmp_path / "cache")) == 5
    assert found.stat().st_mtime_ns == stamp


BUILDER = """
import sys, time
from pathlib import Path
from loongforge.data import index
read = index.read_index
def slow(*arguments):
    time.sleep(0.3)
    print("built", flush=True)
    return read(*arguments)
index.read_index = slow
print(len(list(index.open_indices([Path(name) for name in sys.argv[1:]], Path()))))
"""


def test_of_two_processes_one_builds(shard: Path) -> None:
    shards = [str(shard), str(write_shards([("z", {"json": b"{}"})], shard.parent / "other")[0])]
    processes = [
        subprocess.Popen([sys.executable, "-c", BUILDER, *shards], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sorted(said, key=len) == [["2"], ["built", "built", "2"]]


def test_a_cut_shard_is_an_error_with_its_byte_or_names_what_it_lost(tmp_path: Path) -> None:
    samples = ((f"k{number}", {"json": b"{}", "cls": b"1"}) for number in range(6))
    shard = write_shards(samples, tmp_path / "shards")[0]
    end = 1024 * 6 * 2
    whole = shard.read_bytes()
    shard.write_bytes(whole[: 3 * 2048 + 1024 + 512])  # within the data of k3.cls
    index = opened(shard)
    assert [sample.key for sample in index] == ["k0", "k1", "k2"]
    assert [problem.place for problem in index.problems] == ["sample 4", "the rest"]
    assert index.problems[0].reason == "key 'k3' is cut off with the archive at byte 7680."
    assert "behind byte 7168" in index.problems[1].reason
    assert "lost behind 4 samples" in index.problems[1].reason
    offsets = np.arange(0, end + 1, 2048, dtype="<u8")
    shard.with_name(f"{shard.name}.idx").write_bytes(offsets.tobytes())
    index = opened(shard)
    assert [problem.place for problem in index.problems] == ["sample 4", "sample 5", "sample 6"]
    shard.write_bytes(b"no archive" * 200)
    shard.with_name(f"{shard.name}.idx").unlink()
    with pytest.raises(DataError, match="not a whole plain tar archive"):
        opened(shard)


def test_members_that_would_leave_the_folder_are_named_and_the_others_read(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    link = tarfile.TarInfo("c.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    headers = [*(tarfile.TarInfo(name) for name in ("a.json", "../b.json", "/etc/b.json", "c.json")), link]
    with tarfile.open(shard, "w") as archive:
        for header in (*headers, tarfile.TarInfo("d.json"), tarfile.TarInfo("README"), tarfile.TarInfo("a.json")):
            archive.addfile(header)
    index = opened(shard)
    assert [sample.key for sample in index] == ["a", "d"]
    assert [(problem.place, problem.reason.split(";")[0]) for problem in index.problems] == [
        ("sample 2", "member '../b.json' leads out of the archive."),
        ("sample 3", "member '/etc/b.json' leads out of the archive."),
        ("sample 4", "member 'c.jpg' is a link or a special file"),
        ("sample 6", "member 'README' is not KEY.EXTENSION."),
        ("sample 7", "key 'a' comes twice"),
    ]


def test_few_files_stay_open(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 100)
    files = Files(most=2)
    for number in (0, 1, 2, 0, 4, 3, 3, 0):
        assert files.read(str(paths[number]), 90, 20) == bytes([number]) * 10
        assert len(files) <= 2
    files.close()
    assert len(files) == 0
    assert files.read(str(paths[1]), 0, 3) == b"\1\1\1"
    with pytest.raises(FileNotFoundError):
        files.read(str(tmp_path / "none"), 0, 1)
