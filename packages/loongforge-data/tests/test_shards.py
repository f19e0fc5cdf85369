"""Shards: what is written is found again by key and offset, and what is damaged is named."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from loongforge.core.errors import DataError
from loongforge.data.files import Files
from loongforge.data.media import Medium
from loongforge.data.shards import ShardSample, read_index, shards_of, write_shards


def content(number: int) -> dict[str, bytes]:
    return {"json": b"{}" + b" " * number, "0_a.b.jpg": bytes([number]) * (700 * number)}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write_shards(((f"key_{number}", content(number)) for number in range(5)), tmp_path / "shards")[0]


def members(path: Path, *added: tarfile.TarInfo) -> Path:
    """An archive of empty files with these headers."""
    with tarfile.open(path, "w") as archive:
        for header in added:
            archive.addfile(header, io.BytesIO(b""))
    return path


def test_what_is_written_is_found_again(tmp_path: Path) -> None:
    paths = write_shards(((f"key_{number}", content(number)) for number in range(7)), tmp_path / "shards", maxcount=3)
    assert [path.name for path in paths] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert shards_of(tmp_path / "shards") == paths
    samples: list[ShardSample] = [sample for path in paths for sample in read_index(path)]
    assert [sample.key for sample in samples] == [f"key_{number}" for number in range(7)]
    files = Files()
    for number in (6, 0, 3):  # in any order
        for extension, expected in content(number).items():
            member = samples[number].find(extension)
            assert member is not None
            assert samples[number].read(member, files) == expected
    assert samples[0].find("0_a") is None


def test_webdataset_reads_them_in_the_same_way(shard: Path) -> None:
    """Keys end at the first dot of the file's name, folders belong to the key; checked against plain tarfile."""
    with tarfile.open(shard) as archive:
        assert archive.getnames()[:2] == ["key_0.json", "key_0.0_a.b.jpg"]
    folders = members(shard.with_name("folders.tar"), *(tarfile.TarInfo(f"{one}/k.json") for one in "ab"))
    assert [sample.key for sample in read_index(folders)] == ["a/k", "b/k"]


def test_a_cut_archive_is_found_wherever_it_is_cut(shard: Path) -> None:
    whole = shard.read_bytes()
    needed = len(whole.rstrip(b"\0"))
    cut = shard.with_name("cut.tar")
    for size in range(100, needed, 397):
        cut.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"cut\.tar: .*cut off"):
            list(read_index(cut))


def test_what_is_not_a_plain_archive_is_refused(shard: Path) -> None:
    other = shard.with_name("other.tar")
    other.write_bytes(shard.read_bytes() * 2)
    with pytest.raises(DataError, match="something follows the end of the archive"):
        list(read_index(other))
    other.write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(DataError, match="compressed"):
        list(read_index(other))


@pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "/etc/evil.json"])
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leads out of the archive"):
        list(read_index(members(tmp_path / "evil.tar", tarfile.TarInfo(name))))


def test_links_are_refused(tmp_path: Path) -> None:
    link = tarfile.TarInfo("k.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    with pytest.raises(DataError, match=r"member 'k\.jpg' is a link"):
        list(read_index(members(tmp_path / "link.tar", link)))


def test_keys_that_come_twice_are_refused(tmp_path: Path) -> None:
    headers = [tarfile.TarInfo(name) for name in ("a.json", "b.json", "a.jpg")]
    with pytest.raises(DataError, match="key 'a' comes twice"):
        list(read_index(members(tmp_path / "twice.tar", *headers)))
    headers = [tarfile.TarInfo(name) for name in ("a.json", "a.json")]
    with pytest.raises(DataError, match="key 'a' comes twice"):
        list(read_index(members(tmp_path / "twice.tar", *headers)))
    with pytest.raises(DataError, match=r"k\.1.*keys are unique"):
        write_shards([("k.1", {"json": b""})], tmp_path / "dots")
    with pytest.raises(DataError, match="holds shards already"):
        write_shards([], tmp_path)


def test_notes_and_folders_are_no_samples(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("some")
    folder.type = tarfile.DIRTYPE
    path = members(tmp_path / "notes.tar", folder, tarfile.TarInfo("__meta__"), tarfile.TarInfo("some/k.json"))
    assert [sample.key for sample in read_index(path)] == ["some/k"]
    with pytest.raises(DataError, match="'README' is not KEY"):
        list(read_index(members(tmp_path / "stray.tar", tarfile.TarInfo("README"))))


def test_a_member_is_a_file_of_its_own(shard: Path) -> None:
    member = list(read_index(shard))[3].find("0_a.b.jpg")
    assert member is not None
    with Medium(kind="image", path=str(shard), offset=member.offset, size=member.size).open() as stream:
        assert stream.read() == content(3)["0_a.b.jpg"]
        assert stream.seek(-5, io.SEEK_END) == 2095
        assert stream.read(99) == b"\3" * 5
    beyond = Medium(kind="image", path=str(shard), offset=member.offset, size=1 << 20, name="k.jpg")
    with pytest.raises(DataError, match=r"image k\.jpg in .* cut off"), beyond.open():
        pass


def test_places_without_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar file"):
        shards_of(tmp_path)
    with pytest.raises(DataError, match="no file"):
        shards_of(tmp_path / "none.tar")
