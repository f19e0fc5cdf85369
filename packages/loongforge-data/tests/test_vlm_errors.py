"""What conversations with images refuse, and how they say it."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
from seeing_rows import asks, batches, pack

from loongforge.core.errors import DataError
from loongforge.data.vlm import open_vlm

SEQ = 128


def test_a_corrupt_or_changed_image_is_named(pictures: Path, write_rows, request_for) -> None:
    whole = (pictures / "5.png").read_bytes()
    (pictures / "5.png").write_bytes(whole[: len(whole) // 2])
    folder = pack(pictures, {"bad": (asks("5.png"), {"5.png": "5.png"})})
    source = open_vlm(request_for(folder, num_samples=1))
    with pytest.raises(DataError, match=r"image bad\.5\.png in .*shard-000000\.tar: not a readable image"):
        source[0]
    with pytest.raises(
        DataError, match=r"sample 0 cannot be read: .*:key 'bad': image bad\.5\.png .*--max-bad-samples N"
    ):
        batches(open_vlm(request_for(folder, num_samples=2)), 0)
    source = open_vlm(request_for(write_rows(pictures / "rows.jsonl", [asks("4.png")]), num_samples=1))
    (pictures / "4.png").write_bytes((pictures / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"image .*4\.png has another size than when it was tokenised"):
        source[0]
    (pictures / "clip.mp4").write_bytes((pictures / "clip.mp4").read_bytes()[:600])
    row = {**asks(), "videos": ["clip.mp4"]}
    row["messages"][0]["content"] = "<video>"
    with pytest.raises(DataError, match=r"video .*clip\.mp4: not a readable video"):
        open_vlm(request_for(write_rows(pictures / "video.jsonl", [row]), num_samples=1))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "fewer images": ({**asks("0.png", "1.png"), "images": ["0.png"]}, r"2 places for images .* 1 in the list 'images'"),
    "more images": ({**asks("0.png"), "images": ["0.png", "1.png"]}, r"1 places for images .* 2 in the list 'images'"),
    "no video": ({**asks(question="<video>?")}, "1 places for videos"),
    "outside": (asks("../secret.png"), r"image '\.\./secret\.png' leads out of the data's folder"),
    "hidden": (asks("a/../../secret.png"), "leads out of the data's folder"),
    "address": (asks("https://a.b/c.png"), "only files are read"),
    "absent": (asks("none.png"), r"image .*none\.png: there is no such file"),
    "no image": (asks("rows.jsonl"), r"image .*rows\.jsonl: not a readable image"),
    "mark": (asks(question="<pad>"), "holds '<pad>', which marks where images stand"),
    "part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "a part of type 'audio' is not known"),
    "speaker": ({"messages": [{"from": "cat", "value": ""}]}, "message 0 is from 'cat'"),
    "list": ({**asks("0.png"), "images": [3]}, "must be a path or a list of paths"),
    "long": (asks("0.png", question="forge " * 200), r"tokens, --seq-length 128 holds 129"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named_by_line(name: str, pictures: Path, write_rows, request_for) -> None:
    row, reason = BAD[name]
    (pictures.parent / "secret.png").write_bytes((pictures / "0.png").read_bytes())
    file = write_rows(pictures / "rows.jsonl", [asks("1.png"), row])
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}"):
        open_vlm(request_for(file))
    assert not [entry for entry in (pictures.parent / "cache").iterdir() if "lock" not in entry.name]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"texts": [], "name": ["../../secret.png"]}, r"field 'messages' must be a list"),
        ({**asks("x"), "images": ["../../secret.png"]}, r"image '\.\./\.\./secret\.png' is not among the members"),
        ({**asks("x"), "images": ["/etc/hostname"]}, "is not among the members json, png"),
        ({"media_files": []}, "packed already"),
        ("text", "its json holds str"),
    ],
)
def test_bad_samples_are_named_by_shard_and_key(content: Any, reason: str, pictures: Path, request_for) -> None:
    (pictures.parent / "secret.png").write_bytes((pictures / "0.png").read_bytes())
    folder = pack(pictures, {"good": (asks("png"), {"png": "0.png"}), "bad": (content, {"png": "0.png"})})
    with pytest.raises(DataError, match=rf"shard-000000\.tar:key 'bad': .*{reason}"):
        open_vlm(request_for(folder))


@pytest.mark.parametrize(("package", "name"), [("PIL", "0.png"), ("av", "clip.mp4")])
def test_absent_libraries_say_how_to_install(
    package: str, name: str, pictures: Path, write_rows, request_for, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = asks(name) if package == "PIL" else {**asks(question="<video>"), "videos": [name]}
    file = write_rows(pictures / "rows.jsonl", [row])
    real = builtins.__import__

    def absent(wanted: str, *rest: Any) -> Any:
        if wanted.partition(".")[0] == package:
            raise ImportError(wanted)
        return real(wanted, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(DataError, match=r"pip install 'loongforge-data\[vision\]'"):
        open_vlm(request_for(file))


def test_a_model_without_an_encoder_is_refused(pictures: Path, write_rows, request_for) -> None:
    with pytest.raises(DataError, match="this model has none"):
        open_vlm(request_for(write_rows(pictures / "rows.jsonl", [asks("0.png")]), visual=None))
    with pytest.raises(DataError, match=r"read from \.jsonl, .* files, \.tar shards"):
        open_vlm(request_for(pictures / "0.png"))
