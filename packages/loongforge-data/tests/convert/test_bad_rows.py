"""Rows that cannot be used are named with their reason, and counted; everything else is refused in one sentence."""

from __future__ import annotations

import io
import json
import re
import struct
import wave
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loongforge.core.errors import DataError
from loongforge.data.convert import check
from loongforge.data.convert.check import check_image, check_video
from loongforge.data.convert.rows import read_rows


def row_of(**fields: Any) -> dict[str, Any]:
    said = "<image>" * len(fields.get("images", [])) + "what?"
    return {"messages": [{"role": "user", "content": said}, {"role": "assistant", "content": "this"}], **fields}


def bad_media(folder: Path, good: Path) -> None:
    """Files with one thing wrong each."""
    jpeg = (good / "pictures/v1.5/0.jpg").read_bytes()
    png = (good / "pictures/v1.5/1.PNG").read_bytes()
    (folder / "half.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    (folder / "broken.png").write_bytes(png[:60] + bytes(20) + png[80:])
    film = (good / "films/0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(film[: len(film) // 2])
    (folder / "folder.jpg").mkdir()
    (folder / "note").write_text("hello")


CASES: list[tuple[Any, str]] = [
    ("{broken", r"not JSON"),
    ([1], r"a JSON object was expected, found list"),
    (
        row_of(images=["half.jpg"]),
        r"image .*half.jpg: not a readable image: (image file is truncated|Truncated File Read)",
    ),
    (row_of(images=["empty.jpg"]), r"'empty.jpg': the file is empty"),
    (row_of(images=["text.jpg"]), r"text.jpg: not a readable image: no JPEG, PNG"),
    (row_of(images=["broken.png"]), r"broken.png: not a readable image"),
    (row_of(images=["gone.jpg"]), r"'gone.jpg': there is no such file"),
    (row_of(images=["folder.jpg"]), r"folder.jpg is not a file"),
    (row_of(images=["note"]), r"neither its name nor its first bytes are those of images"),
    (row_of(images=["../good.jpg"]), r"'../good.jpg' leads out of"),
    (row_of(images=["a/../../good.jpg"]), r"leads out of"),
    (row_of(images=["https://host/a.jpg"]), r"only files are taken; download it"),
    (row_of(images=[{"bytes": "x"}]), r"holds the bytes of a file"),
    (row_of(images=[7]), r"field 'images' must be a path"),
    (row_of(images=["good.jpg"], image="other.jpg"), r"'images' and 'image' name different files"),
    (row_of(videos=["cut.mp4"]), r"cut.mp4: not a readable video"),
    (row_of(videos=["good.jpg"]), r"neither its name nor its first bytes are those of videos"),
    (row_of(audio="a.wav"), r"it lists sounds"),
    ({"text": "no messages"}, r"no field 'messages'; there are 'text' \(--columns_messages chooses\)"),
    ({"messages": []}, r"field 'messages' is empty"),
    ({"messages": "hello"}, r"field 'messages' holds str"),
    ({"messages": ["hello"]}, r"message 0 is str, not an object"),
    ({"messages": [{"role": "user"}]}, r"message 0 says nothing"),
    ({"messages": [{"role": "user", "content": 3}]}, r"content is neither text nor a list of parts"),
    ({"messages": [{"role": 3, "content": "hi"}]}, r"role 3 is not a name"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, r"half of a surrogate pair"),
    (row_of(id="twice"), r"key 'twice' comes twice; --key row"),
    (row_of(id="x" * 300), r"longer than 200 bytes"),
]


@pytest.fixture
def corrupt(tmp_path: Path, media: Path) -> Path:
    """A file of all cases, with good rows around each, beside the files they name."""
    folder = tmp_path / "bad"
    folder.mkdir()
    bad_media(folder, media)
    for place in (folder, tmp_path):
        (place / "good.jpg").write_bytes((media / "pictures/v1.5/0.jpg").read_bytes())
    lines = [json.dumps(row_of(id="twice", images=["good.jpg"]))]
    for case, _ in CASES:
        lines += [case if isinstance(case, str) else json.dumps(case), json.dumps(row_of(images=["good.jpg"]))]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("workers", [0, 2])
def test_every_bad_row_is_named_and_the_others_are_written(
    workers: int, corrupt: Path, convert: Callable[..., Path], tmp_path: Path, capsys
) -> None:
    here = ["--image_dir", str(corrupt.parent), "--video_dir", str(corrupt.parent), "--maxcount=10"]
    with pytest.raises(DataError) as caught:
        convert(corrupt, *here, workers=workers)
    assert caught.value.exit_code == 4
    assert f"{corrupt}:2: row_2: not JSON" in caught.value.problems[0]
    assert f"{len(CASES)} of {2 * len(CASES) + 1} rows cannot be used" in caught.value.problems[-1]
    assert not (tmp_path / "out/manifest.json").exists()
    assert not (tmp_path / "out/.nv-meta").exists()
    out = convert(corrupt, *here, "--on-bad=skip", "--json", workers=workers)
    account = json.loads(capsys.readouterr().out)
    assert (account["rows"], account["written"], account["skipped"]) == (2 * len(CASES) + 1, len(CASES) + 1, len(CASES))
    report = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert [one["row"] for one in report] == [2 * number + 2 for number in range(len(CASES))]
    for one, (case, reason) in zip(report, CASES, strict=True):
        assert re.search(reason, one["reason"]), (case, one)
        assert (one["file"], one["line"], one["outcome"]) == ("rows.jsonl", one["row"], "skipped")


def test_a_mended_file_is_taken_up(convert, tmp_path: Path, media: Path) -> None:
    rows = [row_of(images=[str(tmp_path / "late.jpg")]), row_of()]
    with pytest.raises(DataError, match="there is no such file"):
        convert(rows)
    (tmp_path / "late.jpg").write_bytes((media / "pictures/v1.5/0.jpg").read_bytes()[:300])
    with pytest.raises(DataError, match="written from other files"):
        convert(rows)
    with pytest.raises(DataError, match="not a readable image"):
        convert(rows, "--overwrite")
    convert(rows, "--on-bad=skip")
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):  # finished with a row left out is not without
        convert(rows)


def test_the_budget_stops_a_hopeless_conversion(convert, tmp_path: Path) -> None:
    rows = [row_of(images=["gone.jpg"]) for _ in range(9)]
    with pytest.raises(DataError, match="More than 3 rows cannot be used"):
        convert(rows, "--on-bad=skip", "--max-bad=3")
    assert len((tmp_path / "out/report.jsonl").read_text().splitlines()) == 4
    with pytest.raises(DataError, match="none of 9 rows can be used"):
        convert(rows, "--on-bad=skip")


def test_places_without_an_image_are_noted(convert, capsys) -> None:
    rows = [{**row_of(), "image": "v1.5/0.jpg"}, row_of()]
    out = convert(rows)
    assert "2 written + 0 skipped; 1 images, 0 videos in 1 shards" in (said := capsys.readouterr().out)
    assert "1 noted in report.jsonl" in said
    (note,) = [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]
    assert (note["row"], note["outcome"]) == (1, "noted")
    assert note["reason"] == "0 places for images in the messages (<image>), 1 images"


@pytest.mark.parametrize(
    ("flags", "fields", "reason"),
    [
        (["--media=image"], {"videos": ["0.mp4"]}, "with --media image; --media mix takes both"),
        (["--media=video"], {"images": ["v1.5/0.jpg"]}, "with --media video"),
        (
            ["--sample_type=vqa"],
            {"images": ["v1.5/0.jpg", "v1.5/4.jpg"]},
            "vqa is one image; this row has image, image",
        ),
        (["--sample_type=vqa"], {"image": "v1.5/0.jpg", "tools": [{}]}, "2 messages and tools or system"),
        (["--sample_type=caption"], {"video": "0.mp4"}, "caption is one image; this row has video"),
    ],
)
def test_what_a_sample_type_cannot_hold_is_not_dropped(flags, fields, reason, convert) -> None:
    with pytest.raises(DataError, match=reason):
        convert([row_of(**fields)], *flags)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('[{"a": 1}, {"b": 2]', r"rows.json:1: a row begins here that is not whole JSON"),
        ('[{"a": 1}\n,\n{"b": "x', r"rows.json:3: a row begins here that is not whole JSON"),
        ('[{"a": 1} {"b": 2}]', r"rows.json:1: ',' was expected in the list, found '\{'"),
        ('[{"a": 1},\n{"b": 2}', r"rows.json:2: ',' was expected in the list, the file ends: it is cut off"),
        ("[] []", "something follows the end of the list"),
        ('[{"a": "\udcff"}]', "not UTF-8"),
    ],
)
def test_a_list_that_breaks_off_is_said(text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=reason):
        list(read_rows(tmp_path / "rows.json"))


def test_lists_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Borders of pieces may lie anywhere; lines and bytes are right, and json.loads agrees."""
    values = [{"a": "数据\n" * number, "b": [number, -1.5e3, None]} for number in range(20)] + [12345, "text", [], {}]
    text = json.dumps(values, indent=1, ensure_ascii=False)
    (tmp_path / "rows.json").write_text(f"\ufeff\n{text}\n ")
    for chunk in (1, 7, 64, 1 << 20):
        monkeypatch.setattr("loongforge.data.convert.rows.CHUNK", chunk)
        rows = list(read_rows(tmp_path / "rows.json"))
        assert [row.value for row in rows] == values
        lines = f"\n{text}".split("\n")
        assert all(lines[row.line - 1].strip() for row in rows if row.line)
        assert [row.number for row in rows if row.problem] == [21, 22, 23]
    (tmp_path / "rows.json").write_text('\n{"a": 1}\n\n{"a": 2}')  # rows under the name of a list
    assert [(row.line, row.value["a"]) for row in read_rows(tmp_path / "rows.json")] == [(2, 1), (4, 2)]


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    made = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b""))):
        made += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return made


def test_absurd_headers_are_refused(media: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="more than 178956970 pixels"):
        check_image(png_header(40_000, 40_000))
    picture = (media / "pictures/v1.5/0.jpg").read_bytes()
    monkeypatch.setattr(check, "MAX_IMAGE_PIXELS", 16 * 24 - 1)
    with pytest.raises(ValueError, match="24 x 16 pixels, at most 383 are taken"):
        check_image(picture)
    film = (media / "films/0.mp4").read_bytes()
    check_video(io.BytesIO(film))
    monkeypatch.setattr(check, "MAX_FRAME_PIXELS", 16 * 32 - 1)
    with pytest.raises(ValueError, match="header says 3 frames of 32 x 16 pixels"):
        check_video(io.BytesIO(film))


def test_a_jpeg_in_small_is_as_good_a_check_as_in_full(media: Path) -> None:
    """Wherever the file is cut: refused exactly where a full decode refuses it."""
    content = (media / "pictures/v1.5/32.jpg").read_bytes()

    def refused(decode: Callable[[bytes], Any], size: int) -> bool:
        try:
            decode(content[:size])
        except (OSError, ValueError, SyntaxError):
            return True
        return False

    def whole(part: bytes) -> None:
        with Image.open(io.BytesIO(part)) as image:
            image.load()

    sizes = range(0, len(content) + 1, 13)
    verdicts = [refused(check_image, size) for size in sizes]
    assert verdicts == [refused(whole, size) for size in sizes]
    assert True in verdicts
    assert not refused(check_image, len(content))


def test_a_container_without_pictures_is_no_video(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(200))
    with open(tmp_path / "sound.wav", "rb") as file, pytest.raises(ValueError, match="no video stream"):
        check_video(file)
