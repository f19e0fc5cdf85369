"""Folders that Energon has prepared, read by what their own files say; compressed shards, read once into the cache."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loongforge.core.errors import DataError
from loongforge.data import unpack
from loongforge.data.cli import command
from loongforge.data.energon_folder import EnergonFolder
from loongforge.data.shards import write_shards
from loongforge.data.visual_file import sources
from loongforge.data.vlm import VisualSource, open_vlm

VQA = {
    "sample_type": {"__module__": "megatron.energon", "__class__": "VQASample"},
    "field_map": {"image": "png,jpg", "context": "json[asked]", "answers": "answer.txt"},
}


def prepared(folder: Path, parts: dict[str, list[str]], dataset: dict[str, Any] | None = None, **more: Any) -> Path:
    (folder / ".nv-meta").mkdir(parents=True, exist_ok=True)
    (folder / ".nv-meta/split.yaml").write_text(json.dumps({"split_parts": parts, **more}))
    if dataset is not None:
        (folder / ".nv-meta/dataset.yaml").write_text(json.dumps(dataset))
    return folder


@pytest.fixture
def shards(pictures: Path, tmp_path: Path) -> Path:
    """`part-0.tar` to `part-3.tar` with two samples each: a picture, what is asked in the json, the answer as text."""
    for number in range(4):
        samples = []
        for place in range(2):
            asked = json.dumps({"asked": f"q{number}{place}"}).encode()
            answer = " ".join(["forge"] * (1 + 2 * number + place)).encode()
            picture = (pictures / f"{(2 * number + place) % 6}.png").read_bytes()
            samples.append((f"s{number}{place}", {"png": picture, "json": asked, "answer.txt": answer}))
        (written,) = write_shards(samples, tmp_path / f"made{number}")
        (tmp_path / "energon").mkdir(exist_ok=True)
        written.rename(tmp_path / f"energon/part-{number}.tar")
    return tmp_path / "energon"


def lengths(source: VisualSource) -> list[int]:
    """Answers of every conversation, by their tokens that count."""
    return [int(np.asarray(source[number]["loss_mask"]).sum()) for number in range(len(source))]


def test_parts_and_fields_are_those_of_its_files(
    shards: Path, pictures: Path, write_rows, request_for: Callable[..., Any]
) -> None:
    prepared(shards, {"train": ["part-{0..2}.tar"], "val": ["part-3.tar"]}, VQA, exclude=["part-1.tar"])
    train = open_vlm(request_for(shards, num_samples=4, packing=False))
    valid = open_vlm(request_for(shards, num_samples=2, packing=False, part="valid"))
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"<image>q{number}{place}"},
                {"role": "assistant", "content": " ".join(["forge"] * (1 + 2 * number + place))},
            ],
            "images": [f"{(2 * number + place) % 6}.png"],
        }
        for number in (0, 2, 3)
        for place in range(2)
    ]
    plain = open_vlm(request_for(write_rows(pictures / "rows.jsonl", rows), num_samples=6, packing=False))
    assert isinstance(train, VisualSource)
    found = [*(train[number] for number in range(4)), *(valid[number] for number in range(2))]
    for number, sample in enumerate(found):
        assert set(sample) == set(plain[number])
        for name, values in sample.items():
            np.testing.assert_array_equal(values, plain[number][name], err_msg=name)  # type: ignore[literal-required]


def test_a_converted_folder_is_read_in_parts(pictures: Path, write_rows, request_for, tmp_path: Path) -> None:
    rows = [
        {"id": f"n{n}", "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}],
         "image": f"{n % 6}.png"}
        for n in range(12)
    ]  # fmt: skip
    file = write_rows(pictures / "rows.jsonl", rows)
    words = ["convert-to-webdataset", "--json_file", str(file), "--image_dir", str(pictures), "--sample_type", "vqa"]
    assert command([*words, "--output_dir", str(tmp_path / "out"), "--split", "50,50", "--workers", "0"]) == 0
    train, val = (sources(str(tmp_path / "out"), part) for part in ("train", "valid"))
    assert {path.parent.name for path in train} == {"train"}
    assert {path.parent.name for path in val} == {"val"}
    whole, alone = (open_vlm(request_for(tmp_path / path, num_samples=3)) for path in ("out", "out/train"))
    for number in range(3):
        for name, values in alone[number].items():
            np.testing.assert_array_equal(values, whole[number][name], err_msg=name)  # type: ignore[literal-required]


@pytest.mark.parametrize(
    ("parts", "dataset", "says"),
    [
        ({"train": ["../part-0.tar"]}, None, "'../part-0.tar' leads out of the folder"),
        ({"train": ["part-9.tar"]}, None, "is absent, which .nv-meta/split.yaml names: 1 of 1 shards are"),
        ({"val": ["part-0.tar"]}, None, "has no shards of 'train'; it has val (1 shards)"),
        ({"train": ["part-{0..99999999}.tar"]}, None, "stands for more than 100000 shards"),
        ({"train": ["part-0.tar"]}, {**VQA, "sample_loader": "loader.py:load"}, "names Python code, which is not run"),
        ({"train": ["part-0.tar"]}, {"sample_type": {"__class__": "OCRSample"}}, "sample type 'OCRSample' is not read"),
        ({"train": ["part-0.tar"]}, {**VQA, "field_map": {"image": "png"}}, "field_map of VQASample needs 'context'"),
    ],
)
def test_what_a_folder_cannot_say(
    parts: dict[str, list[str]], dataset: dict[str, Any] | None, says: str, shards: Path
) -> None:
    prepared(shards, parts, dataset)
    with pytest.raises(DataError) as error:
        sources(str(shards))
    assert says in str(error.value)


def test_a_field_that_a_sample_lacks_is_named(shards: Path, request_for) -> None:
    places = {**VQA["field_map"], "context": "json[question]"}
    prepared(shards, {"train": ["part-0.tar"]}, {**VQA, "field_map": places})
    with pytest.raises(DataError, match=r"key 's00'.*field 'context' is json\[question\] in dataset.yaml: KeyError"):
        open_vlm(request_for(shards, num_samples=1))


def test_a_folder_without_its_files_is_none(tmp_path: Path) -> None:
    assert EnergonFolder.open(tmp_path) is None
    assert EnergonFolder.open(tmp_path / "absent") is None


PACK = {".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}


@pytest.mark.parametrize("ending", unpack.COMPRESSED)
def test_compressed_shards_are_read_once(ending: str, shards: Path, request_for, tmp_path: Path) -> None:
    prepared(shards, {"train": ["part-{0..3}.tar"]}, VQA)
    plain = open_vlm(request_for(shards, num_samples=8))
    packed = tmp_path / "packed"
    for number in range(4):
        packed.mkdir(exist_ok=True)
        (packed / f"part-{number}{ending}").write_bytes(PACK[ending]((shards / f"part-{number}.tar").read_bytes()))
    prepared(packed, {"train": [f"part-{{0..3}}{ending}"]}, VQA)
    source = open_vlm(request_for(packed, num_samples=8))
    copies = sorted((tmp_path / "cache/unpacked").glob("*.tar"))
    assert [copy.read_bytes() for copy in copies] == [(shards / f"part-{n}.tar").read_bytes() for n in range(4)]
    for number in range(8):
        for name, values in plain[number].items():
            np.testing.assert_array_equal(values, source[number][name], err_msg=name)  # type: ignore[literal-required]
    times = [copy.stat().st_mtime_ns for copy in copies]
    open_vlm(request_for(packed, num_samples=8, seed=5))
    assert [copy.stat().st_mtime_ns for copy in copies] == times
    with pytest.raises(DataError, match="is compressed, which training alone unpacks"):
        sources(str(packed))


@pytest.mark.parametrize("harm", ["cut", "flipped", "bomb"])
def test_a_compressed_shard_that_is_damaged_is_named(
    harm: str, shards: Path, request_for, tmp_path, monkeypatch
) -> None:
    whole = gzip.compress((shards / "part-0.tar").read_bytes())
    file = tmp_path / "one.tar.gz"
    file.write_bytes({"cut": whole[:-40], "flipped": whole[:60] + bytes(20) + whole[80:], "bomb": whole}[harm])
    if harm == "bomb":
        monkeypatch.setattr(unpack, "_SMALL", 1000)
        monkeypatch.setattr(unpack, "_MOST", 1)
    with pytest.raises(DataError, match=r"one\.tar\.gz.*(cut off|refused)"):
        open_vlm(request_for(file, num_samples=1))
    assert not list((tmp_path / "cache/unpacked").glob("*.tar*writing*"))
