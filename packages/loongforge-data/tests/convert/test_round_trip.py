"""What is converted comes back whole: through webdataset, through tarfile, and through our own source."""

from __future__ import annotations

import json
import struct
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from loongforge.core.errors import DataError
from loongforge.data.cli import command
from loongforge.data.vlm import open_vlm


def read_back(folder: Path) -> list[dict[str, Any]]:
    """Samples as webdataset groups them, undecoded but for the json."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.rglob("*.tar")):
        with open(path, "rb") as stream:  # webdataset's own opener leaves files open
            for sample in group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])):
                found.append({**sample, "json": json.loads(sample["json"])})
    return found


def originals(rows: list[dict[str, Any]], media: Path) -> list[list[bytes]]:
    """Bytes of the files of each row, images first."""
    found: list[list[bytes]] = []
    for row in rows:
        names = row.get("images", [row["image"]] if "image" in row else [])
        films = row.get("videos", [row["video"]] if "video" in row else [])
        paths = [media / "pictures" / name for name in names] + [media / "films" / name for name in films]
        found.append([path.read_bytes() for path in paths])
    return found


def check(folder: Path, rows: list[dict[str, Any]], media: Path) -> None:
    """Every row is there in order, with its messages, its other columns and its files."""
    samples = read_back(folder)
    assert len(samples) == len(rows)
    for number, (sample, row, files) in enumerate(zip(samples, rows, originals(rows, media), strict=True), start=1):
        assert sample["__key__"] == (row.get("id") or f"row_{number}").replace(".", "_")
        body = sample["json"]
        assert body["texts"] == row["messages"]
        assert [sample[name] for name in body["name"]] == files
        others = {name: value for name, value in row.items() if name not in ("messages", *LISTS)}
        assert {name: body[name] for name in others} == others
        assert {name for name in sample if not name.startswith("__")} == {"json", *body["name"]}


LISTS = ("image", "images", "video", "videos")


@pytest.mark.parametrize("form", ["json", "jsonl", "parquet"])
def test_forty_one_rows_lose_nothing(
    form: str, rows: list[dict[str, Any]], media: Path, convert: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    file = tmp_path / f"rows.{form}"
    if form == "parquet":
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([{**dict.fromkeys(COLUMNS), **row} for row in rows]), file
        )
        kept = [name for name in COLUMNS if name not in LISTS]
        rows = [{**dict.fromkeys(kept), **row} for row in rows]  # a table has every column in every row
    else:
        lines = [json.dumps(row, ensure_ascii=form == "json") for row in rows]
        file.write_text("[\n" + ",\n".join(lines) + "]" if form == "json" else "\n".join(lines))
    out = convert(file, "--maxcount=9", "--json")
    account = json.loads(capsys.readouterr().out)
    counts = {"rows": 41, "written": 41, "skipped": 0, "images": 33, "videos": 5, "shards": 5, "noted": 0}
    assert {name: account[name] for name in counts} == counts
    check(out, rows, media)
    assert Counter(sample["json"]["media"] for sample in read_back(out)) == {
        "image": 25,
        "text": 11,
        "mix": 3,
        "video": 2,
    }
    assert command(["verify", str(out)]) == 0
    assert "5 shards are as written: 41 samples" in capsys.readouterr().out


COLUMNS = ("id", "score", "tools", "system", "source", "image", "images", "video", "videos")


def test_our_own_source_trains_on_them(
    rows: list[dict[str, Any]], convert, make_request, seeing_tokenizer_dir, processor, tmp_path: Path, media: Path
) -> None:
    """The source reads from the shards what it reads from the rows, image by image."""
    values = {"tokenizer_path": str(seeing_tokenizer_dir), "seq_length": 600, "shuffle": False, "visual": processor}
    values |= {"position_rank": 3, "overlong": "error", "num_samples": 41}

    def source(path: Path) -> Any:
        return open_vlm(make_request(tmp_path / "cache", paths=(str(path),), **values))

    both = tmp_path / "both"
    both.mkdir()
    for place in ("pictures", "films"):
        for path in (media / place).iterdir():
            (both / path.name).symlink_to(path)
    (both / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    direct, shards = source(both / "rows.jsonl"), source(convert(rows, "--maxcount=20"))
    assert shards.report()["images"] == 33
    assert shards.report()["videos"] == 5
    for number in range(41):
        one, other = direct[number], shards[number]
        assert set(one) == set(other)
        for name in one:
            assert (one[name] == other[name]).all(), (number, name)


def test_parts_that_name_files_become_places(media: Path, convert, tmp_path: Path) -> None:
    said = [
        {"type": "image_url", "image_url": {"url": f"file://{media}/pictures/v1.5/4.jpg"}},
        {"type": "text", "text": "and"},
        {"type": "image", "image": "v1.5/8.jpg", "detail": "low"},
        {"type": "image"},
    ]
    row = {"messages": [{"role": "user", "content": said}], "images": ["./v1.5/0.jpg"]}
    (sample,) = read_back(convert([row]))
    assert sample["json"]["texts"][0]["content"] == [
        {"type": "image"}, said[1], {"type": "image", "detail": "low"}, {"type": "image"}
    ]  # fmt: skip
    assert sample["json"]["name"] == ["0_4.jpg", "1_8.jpg", "2_0.jpg"]
    assert sample["1_8.jpg"] == (media / "pictures/v1.5/8.jpg").read_bytes()


def test_columns_that_mean_something_in_a_sample_stand_apart(convert) -> None:
    row = {"said": [{"role": "user", "content": "hello"}], "name": "n", "captions": ["c"], "messages": "m", "more": 1}
    (sample,) = read_back(convert([row], "--columns_messages", "said"))
    apart = {"name": "n", "captions": ["c"], "messages": "m"}
    assert sample["json"] == {"texts": row["said"], "media": "text", "name": [], "more": 1, "columns": apart}
    (sample,) = read_back(convert([row], "--columns-messages=said", "--sample-type=chat_mix", into="chat"))
    assert sample["json"] == {"messages": row["said"], "media": "text", "name": [], "more": 1, "columns": apart}


def test_vqa_and_captions_as_energon_maps_them(media: Path, convert) -> None:
    asked = [{"role": "user", "content": "<image>What?"}, {"from": "gpt", "value": "A forge."}]
    rows = [
        {"id": "a/b.c", "messages": asked, "image": "v1.5/0.jpg", "more": 1},
        {"messages": asked, "image": "v1.5/1.PNG"},
    ]
    first, second = read_back(convert(rows, "--sample_type=vqa"))
    assert first["__key__"] == "a_b_c"
    assert [message["content"] for message in first["json"]] == ["<image>What?", "A forge."]
    assert first["jpg"] == (media / "pictures/v1.5/0.jpg").read_bytes()
    assert json.loads(first["extra.json"]) == {"id": "a/b.c", "more": 1}
    assert {"png", "json"} <= set(second)
    rows = [{"messages": asked, "image": "v1.5/0.jpg"}, {"messages": "A forge.", "images": ["v1.5/0.jpg"]}]
    first, second = read_back(convert(rows, "--sample_type=caption", into="captions"))
    assert first["json"] == {"captions": [{"content": "A forge."}], "messages": asked}
    assert second["json"] == {"captions": [{"content": "A forge."}]}


def test_names_that_tar_or_webdataset_would_change(media: Path, convert, tmp_path: Path) -> None:
    long = tmp_path / f"{'Ein langer Name mit Ümlauten ' * 5}.x.JPG"
    bare = tmp_path / "without"
    for path in (long, bare):
        path.write_bytes((media / "pictures/v1.5/0.jpg").read_bytes())
    row = {
        "id": "__meta__",
        "messages": [{"role": "user", "content": "<image><image>"}],
        "images": [str(long), str(bare)],
    }
    (sample,) = read_back(convert([row]))
    assert sample["__key__"] == "id__meta__"
    assert sample["json"]["name"] == [f"0_{long.name.lower()}", "1_without.jpg"]
    assert sample["json"]["name"][0] in sample


def test_energon_finds_every_sample_by_its_offset(rows: list[dict[str, Any]], convert) -> None:
    out = convert(rows, "--maxcount=15", "--split=70,30,0")
    counts = json.loads((out / ".nv-meta/.info.json").read_text())["shard_counts"]
    split = json.loads((out / ".nv-meta/split.yaml").read_text())
    manifest = json.loads((out / "manifest.json").read_text())
    shards = {shard["name"]: shard["samples"] for shard in manifest["shards"]}
    assert counts == shards
    parts = split["split_parts"]
    assert [*parts["train"], *parts["val"], *parts["test"]] == list(shards)
    assert all(name.startswith("train/pretrain-") for name in parts["train"])
    assert all(name.startswith("val/pretrain-") for name in parts["val"])
    for name, count in shards.items():
        content = (out / name).read_bytes()
        offsets = struct.unpack(f"<{count + 1}Q", (out / f"{name}.idx").read_bytes())
        with tarfile.open(out / name) as archive:
            members = archive.getmembers()
            keys = [member.name.split(".")[0] for member in members]
            expected = [
                member.offset for place, member in enumerate(members) if keys[place] != keys[place - 1] or not place
            ]
            assert list(offsets) == [*expected, archive.offset]
        assert not content[offsets[-1] :].strip(b"\0")
    dataset = json.loads((out / ".nv-meta/dataset.yaml").read_text())
    assert dataset["__class__"] == "CrudeWebdataset"
    assert dataset["subflavors"] == {"sample_type": "multi_mix_qa"}


def test_damaged_shards_are_found(rows: list[dict[str, Any]], convert) -> None:
    out = convert(rows, "--maxcount=15")
    shard = out / "pretrain-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    (out / "pretrain-000000.tar.idx").write_bytes(b"1234")
    (out / "more.tar").write_bytes(whole)
    with pytest.raises(DataError) as caught:
        command(["verify", str(out)])
    texts = ("000000.tar.idx is not a list of 16 offsets", "000001.tar is damaged", "more.tar is not in the manifest")
    assert len(caught.value.problems) == 3
    assert all(text in problem for text, problem in zip(texts, caught.value.problems, strict=True))
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        command(["verify", str(out / ".nv-meta")])
