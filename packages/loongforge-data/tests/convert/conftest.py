"""Rows with real images and videos, and conversions of them in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from loongforge.data.cli import command


def noise(height: int, width: int, seed: int) -> np.ndarray:
    """Random colours, uint8 `[height, width, 3]`."""
    return np.random.default_rng(seed).integers(0, 256, size=(height, width, 3), dtype=np.uint8)


def write_video(path: Path, frames: int, seed: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(16, 32, seed + number), format="rgb24")))
        container.mux(stream.encode())


def turn(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures/0.jpg` to `32` in four formats, in folders whose names have dots; `films/0.mp4` to `4`."""
    folder = tmp_path_factory.mktemp("media")
    for name in ("pictures/v1.5", "films"):
        (folder / name).mkdir(parents=True)
    for number in range(33):
        suffix = ("jpg", "PNG", "webp", "a.jpeg")[number % 4]
        Image.fromarray(noise(16 + number, 24, number)).save(folder / f"pictures/v1.5/{number}.{suffix}")
    for number in range(5):
        write_video(folder / f"films/{number}.mp4", 3 + number, number)
    return folder


def picture(number: int) -> str:
    """The path of an image, below `pictures`."""
    return f"v1.5/{number}.{('jpg', 'PNG', 'webp', 'a.jpeg')[number % 4]}"


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """41 rows: 20 of one image, 5 of two, 10 of text in three turns, 3 of image and video, 2 of video, 1 with tools."""
    made: list[dict[str, Any]] = []
    made += [{"id": f"one.{n}", "messages": turn(f"<image>{n}?", "a"), "image": picture(n)} for n in range(20)]
    for n in range(5):
        pair = [picture(20 + 2 * n), picture(21 + 2 * n)]
        made.append({"messages": turn("<image><image>both?", f"数据 {n}"), "images": pair, "score": n / 3})
    for n in range(10):
        made.append({"messages": turn("one", "two") + turn("three", "four") + turn("five", f"six {n}")})
    for n in range(3):
        said = turn("<video>then <image>", "mixed")
        made.append({"messages": said, "images": [picture(30 + n)], "videos": [f"{n}.mp4"]})
    made += [{"messages": turn("<video>", "film"), "video": f"{3 + n}.mp4"} for n in range(2)]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    made.append({"messages": turn("use it", "yes"), "tools": tools, "system": "You look.", "source": {"a": [1, None]}})
    return made


@pytest.fixture
def convert(media: Path, tmp_path: Path) -> Callable[..., Path]:
    """`convert(rows or file, *flags, into=NAME)`: convert with workers in this process, and return the output."""

    def run(given: list[Any] | Path, *flags: str, into: str = "out", workers: int = 0) -> Path:
        file = given if isinstance(given, Path) else write_lines(tmp_path / "rows.jsonl", given)
        base = ["--output_dir", str(tmp_path / into), "--json_file", str(file), f"--workers={workers}"]
        base += ["--image_dir", str(media / "pictures"), "--video_dir", str(media / "films")]
        if not any(flag.startswith(("--sample_type", "--sample-type")) for flag in flags):
            base += ["--sample_type", "multi_mix_qa"]
        assert command(["convert-to-webdataset", *base, *flags]) == 0
        return tmp_path / into

    return run


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, bytes]]:
    """`content(folder)`: every file of an output by its path, apart from the lock."""

    def read(folder: Path) -> dict[str, bytes]:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock"]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    return read
