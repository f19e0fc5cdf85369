"""`loongforge data convert-to-webdataset` against a plain tar of the same files and a decode of each.

    uv run python bench/convert.py [--rows 2000] [--rounds 3]

The peer writes the same members with `tarfile` and decodes every image in full with Pillow, in one process. It checks
first that both archives hold the same members, and that one and two workers write the same bytes. `cpu` is CPU
seconds of all processes together, the least of the rounds, per sample; both sides take turns. Files come from the page
cache.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from loongforge.data.convert.options import ConvertOptions
from loongforge.data.convert.run import Conduct, convert

WIDTH, HEIGHT = 640, 480


def make_rows(folder: Path, count: int) -> Path:
    """Rows with a question to one JPEG each: shapes and noise, about 60 KB as photographs of this size are."""
    generator = np.random.default_rng(0)
    rows = []
    for number in range(count):
        coarse = generator.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
        noisy = smooth.astype(np.int16) + generator.integers(-12, 13, smooth.shape, dtype=np.int16)
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number}.jpg", quality=85)
        said = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A forge. " * 20}]
        rows.append({"messages": said, "images": [f"{number}.jpg"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def plain(file: Path, target: Path, decode: bool) -> None:
    """What the peer does."""
    with tarfile.open(target, "w") as archive:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            row = json.loads(line)
            name = row["images"][0]
            content = (file.parent / name).read_bytes()
            if decode:
                with Image.open(io.BytesIO(content)) as image:
                    image.load()
            body = {"texts": row["messages"], "media": "image", "name": [f"0_{name}"]}
            members = ((f"row_{number}.json", json.dumps(body).encode()), (f"row_{number}.0_{name}", content))
            for member, data in members:
                header = tarfile.TarInfo(member)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))


def ours(file: Path, target: Path, workers: int, count: int) -> None:
    """The same by the converter, in eight shards."""
    options = ConvertOptions(
        json_file=file,
        image_dir=file.parent,
        video_dir=file.parent,
        sample_type="multi_mix_qa",
        maxcount=-(-count // 8),
    )
    convert(options, target, Conduct(workers=workers, overwrite=True))


def timed(call: Callable[[], None]) -> tuple[float, float]:
    """CPU seconds of this process and of those it waited for, and seconds on the clock."""

    def spent() -> float:
        kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))

    cpu, began = spent(), time.perf_counter()
    call()
    return spent() - cpu, time.perf_counter() - began


def check(folder: Path) -> None:
    """The same members everywhere, the same bytes from one and from two workers."""

    def members(paths: list[Path]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for path in paths:
            with tarfile.open(path) as archive:
                for header in archive:
                    stream = archive.extractfile(header)
                    found[header.name] = stream.read() if stream else b""
        return found

    shards = {place: sorted((folder / place).glob("*.tar")) for place in ("one", "two")}
    assert [path.read_bytes() for path in shards["one"]] == [path.read_bytes() for path in shards["two"]]
    assert members(shards["one"]) == members([folder / "plain.tar"]), "they hold different members"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = make_rows(folder, options.rows)
        size = sum(path.stat().st_size for path in folder.glob("*.jpg")) / options.rows
        calls: dict[str, Callable[[], None]] = {
            "tarfile, full decode": lambda: plain(file, folder / "plain.tar", True),
            "tarfile alone": lambda: plain(file, folder / "undecoded.tar", False),
            "convert, this process": lambda: ours(file, folder / "one", 0, options.rows),
            "convert, 2 workers": lambda: ours(file, folder / "two", 2, options.rows),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in calls.items():
                taken[name].append(timed(call))
        check(folder)
    print(f"{options.rows} samples, images of {size / 1000:.0f} KB; load average {os.getloadavg()[0]:.1f}")
    print("| | cpu, us per sample | ratio | samples a second |\n|---|---|---|---|")
    base = min(cpu for cpu, _ in taken["tarfile, full decode"])
    for name, found in taken.items():
        cpu, clock = min(cpu for cpu, _ in found), min(clock for _, clock in found)
        print(f"| {name} | {cpu / options.rows * 1e6:.0f} | {cpu / base:.2f} | {options.rows / clock:.0f} |")


if __name__ == "__main__":
    main()
