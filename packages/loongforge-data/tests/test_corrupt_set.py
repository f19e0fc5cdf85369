"""300 samples, every way of being broken among them: each bad one is named, each other one delivered exactly once."""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from loongforge.core.data.contract import SourceRequest
from loongforge.core.data.loader import Loader, LoaderShape
from loongforge.core.data.quarantine import Budget, Quarantine
from loongforge.core.errors import DataError
from loongforge.data.tokenizer import HFTokenizer
from loongforge.data.tools.pack import write_plan
from loongforge.data.vlm import VisualSource, open_vlm

COUNT, SHARDS, BATCH = 300, 3, 6
LIMIT = Budget(ratio=0.2)

Members = dict[str, bytes]
WAYS: dict[str, tuple[str, Callable[[Members], Members]]] = {}
"""What is done to a sample, and what is said of it."""
LATE = "truncated jpeg"
"""Its header is whole: only who decodes it finds out."""


def way(said: str) -> Callable[[Callable[[Members], Members]], Callable[[Members], Members]]:
    def named(change: Callable[[Members], Members]) -> Callable[[Members], Members]:
        WAYS[change.__name__.replace("_", " ")] = (said, change)
        return change

    return named


@way("not a readable image: image file is truncated")
def truncated_jpeg(members: Members) -> Members:
    return {**members, "jpg": members["jpg"][:-200]}


@way("not a readable image: cannot identify image file")
def wrong_magic(members: Members) -> Members:
    return {**members, "jpg": b"<html>" + members["jpg"][6:]}


@way("image .*jpg in .*not a readable image: cannot identify")
def empty_jpeg(members: Members) -> Members:
    return {**members, "jpg": b""}


@way("image .*: (not a readable image: Image size .* exceeds limit|its header says 20000 x 9000 pixels, at most)")
def image_bomb(members: Members) -> Members:
    header = struct.pack(">IIBBBBB", 20_000, 9_000, 8, 2, 0, 0, 0)
    made = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b""))):
        made += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return {"json": members["json"], "png": made}


@way("1 places for images .* 0 in the list")
def missing_member(members: Members) -> Members:
    return {"json": members["json"]}


@way("its json cannot be read")
def bad_json(members: Members) -> Members:
    return {**members, "json": members["json"][:-4]}


@way("no json among jpg")
def no_json(members: Members) -> Members:
    return {"jpg": members["jpg"]}


@way("video .*its header says 20000000 frames, 4 a second; at most 10000000")
def absurd_video(members: Members) -> Members:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=4)
        video.width, video.height, video.pix_fmt = 32, 16, "yuv420p"
        frame = np.zeros((16, 32, 3), dtype=np.uint8)
        container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode())
    content = bytearray(stream.getvalue())
    counts = content.index(b"stts") + 12
    content[counts : counts + 4] = struct.pack(">I", 20_000_000)
    return {"json": members["json"].replace(b"<image>", b"<video>"), "mp4": bytes(content)}


@way(r"member '\.\./s.*\.json' leads out of the archive")
def path_escaping(members: Members) -> Members:
    return {"../": members["json"]}


def is_bad(number: int) -> str | None:
    """Every tenth sample, the ways in turn, and the truncated ones once more."""
    ways = [*WAYS, LATE]
    return ways[number // 10 % len(ways)] if number % 10 == 3 else None


def sample(number: int) -> Members:
    picture = np.random.default_rng(number).integers(0, 256, size=(32, 40, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "jpeg")
    said = [
        {"role": "user", "content": f"<image>number {number}."},
        {"role": "assistant", "content": "seen"},
    ]
    members = {"json": json.dumps({"messages": said}).encode(), "jpg": stream.getvalue()}
    broken = is_bad(number)
    return WAYS[broken][1](members) if broken else members


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corrupt") / "shards"
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(shard * COUNT // SHARDS, (shard + 1) * COUNT // SHARDS):
                for extension, content in sample(number).items():
                    name = f"s{number}.{extension}" if extension != "../" else f"../s{number}.json"
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    archive.addfile(header, io.BytesIO(content))
    return folder


@pytest.fixture
def request_for(
    make_request, seeing_tokenizer_dir, processor, tmp_path: Path, shards: Path
) -> Callable[..., SourceRequest]:
    values = {"paths": (str(shards),), "tokenizer_path": str(seeing_tokenizer_dir), "seq_length": 128}
    values |= {"visual": processor, "position_rank": 3, "overlong": "error", "may_leave_out": None}
    return lambda **changes: make_request(tmp_path / "cache", **{**values, **changes})


class Alone:
    """The only rank."""

    is_main = True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def total(self, count: int) -> int:
        return count


def expected(*, late: bool) -> set[int]:
    """Numbers of samples that are bad: the late ones, or the others."""
    return {number for number in range(COUNT) if (way := is_bad(number)) and (way == LATE) == late}


def check_named(bad: list[Any], numbers: set[int], shards: Path) -> None:
    """One entry for each, with its shard, its key and what is wrong with it."""
    named = {int(re.findall(r"'?(?:\.\./)?s(\d+)", f"{one.row} {one.reason}")[0]): one for one in bad}
    assert set(named) == numbers
    assert len(bad) == len(numbers)
    for number, one in named.items():
        assert one.file == str(shards / f"{number * SHARDS // COUNT}.tar")
        broken = is_bad(number)
        assert broken is not None
        assert re.search(WAYS[broken][0], one.reason), f"{broken}: {one.reason}"


def taken(
    source: VisualSource,
    quarantine: Quarantine,
    tokenizer: HFTokenizer,
    steps: int,
    *,
    dp: int,
    workers: int,
    start: int,
) -> Iterator[int]:
    """Numbers of the samples that count in these steps, on all ranks."""
    micro = BATCH // dp
    for rank in range(dp):
        shape = LoaderShape(
            micro_batch_size=micro, num_microbatches=1, dp_rank=rank, dp_size=dp, num_workers=workers,
            start_sample=start, position_rank=3, visual=True,
        )  # fmt: skip
        with Loader(source, shape, settle=partial(quarantine.settle, "train")) as loader:
            for _ in range(steps):
                (batch,) = loader.step()
                seen = batch["items_of"].tolist()
                for row, items in enumerate(seen):
                    counts = bool(batch["loss_mask"][row].any())
                    assert counts == bool(items), "an emptied place shows nothing and teaches nothing"
                    if counts:
                        (number,) = re.findall(r"number (\d+)\.", tokenizer.decode(batch["tokens"][row].tolist()))
                        yield int(number)
                assert len(batch["pixels"]) == int(batch["grid"].prod(dim=1).sum())


@pytest.mark.parametrize("late", [True, False], ids=["while training", "before"])
def test_every_bad_sample_is_named_and_every_other_delivered_once(
    late: bool, request_for, shards: Path, seeing_tokenizer_dir: Path
) -> None:
    early = expected(late=False) | (set() if late else expected(late=True))
    units = COUNT - len(early)
    source = open_vlm(request_for(num_samples=units, verify_media=not late))
    check_named(source.left_out, early, shards)
    report = source.report()
    assert (report["rows"], report["quarantined"], report["used"]) == (COUNT, len(early), units)
    quarantine = Quarantine(LIMIT, Alone())
    quarantine.begin([source])
    assert len(quarantine) == len(early)
    tokenizer = HFTokenizer(seeing_tokenizer_dir)
    steps = units // BATCH
    assert steps * BATCH == units, "whole steps see the whole epoch"
    half = steps // 2
    seen = list(taken(source, quarantine, tokenizer, half, dp=2, workers=2, start=0))
    state = json.loads(json.dumps(quarantine.state()))
    after = Quarantine(LIMIT, Alone())  # of another process, after a kill
    after.restore(state)
    after.begin([source])
    seen += taken(source, after, tokenizer, steps - half, dp=3, workers=1, start=half * BATCH)
    good = set(range(COUNT)) - early - expected(late=True)
    assert Counter(seen) == Counter(good), "none twice, none never"
    found = after.state().get("entries", [])
    assert {int(entry["row"].strip("key 's")) for entry in found} == (expected(late=True) if late else set())
    assert len(after) + len(good) == COUNT


def test_without_a_budget_the_first_ones_are_an_error(request_for) -> None:
    with pytest.raises(DataError) as caught:
        open_vlm(request_for(may_leave_out=0))
    assert len(str(caught.value).splitlines()) == 6
    assert "0.tar:" in str(caught.value)
    with pytest.raises(DataError, match=r"--max-bad-samples 7 allows no more"):
        open_vlm(request_for(may_leave_out=7))
    source = open_vlm(request_for())
    with pytest.raises(DataError, match=r"bad, and none is allowed: --max-bad-samples N"):
        Quarantine(Budget(), Alone()).begin([source])
    with pytest.raises(DataError, match=r"--max-bad-ratio 0.05 allows no more"):
        Quarantine(Budget(ratio=0.05), Alone()).begin([source])


def test_a_pack_plan_counts_them(request_for, tmp_path: Path) -> None:
    request = request_for(packing=True)
    account = write_plan(open_vlm(request).packed, request, tmp_path)
    bad = expected(late=False)
    assert (account["rows"], account["conversations"]) == (COUNT, COUNT - len(bad))
    assert account["left_out"] == {"quarantined": len(bad)}
    noted = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    packed = [
        row for line in (tmp_path / "pack_plan.jsonl").read_text().splitlines() for row in json.loads(line)["rows"]
    ]
    rows = [*((note["path"], note["row"]) for note in noted), *((path, row) for path, row in packed)]
    assert len(rows) == len(set(rows)) == COUNT


def test_other_data_have_another_fingerprint(request_for, shards: Path, tmp_path: Path) -> None:
    """What a resume compares: samples that are left out change the order of all others."""
    one = open_vlm(request_for()).fingerprint()
    other = open_vlm(request_for(verify_media=True)).fingerprint()
    assert {name for name in one if one[name] != other[name]} == {"data.0"}
