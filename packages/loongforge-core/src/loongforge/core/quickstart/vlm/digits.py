"""Handwritten digits: the 1,797 images of 8 x 8 grey values that scikit-learn brings, as image files and questions."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loongforge.core.quickstart.corpus import PARTS

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
"""What the assistant says."""
QUESTION = "Which digit is this?"
HELD_OUT_SHARE = 5
"""One image in so many is held out."""
BRIGHTEST = 16
"""Grey values of the set count from 0 to this."""
SHARD = 500
"""Samples in a shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digit:
    """One image."""

    name: str
    """Key in a shard, stem of a file."""
    png: bytes
    answer: str
    """The digit as a word."""
    held_out: bool

    @property
    def row(self) -> dict[str, object]:
        """As a row of fine-tuning; `<image>` stands where the image is seen."""
        said = (("user", f"<image>{QUESTION}"), ("assistant", self.answer))
        return {"messages": [{"role": role, "content": content} for role, content in said]}


def read_digits(side: int) -> list[Digit]:
    """All images, enlarged to `side` x `side` pixels, in the order of the set; which are held out never changes."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    read: list[Digit] = []
    for number, (grey, target) in enumerate(zip(digits.images, digits.target, strict=True)):
        image = Image.fromarray((grey * (255 / BRIGHTEST)).round().astype(np.uint8))
        stream = io.BytesIO()
        image.resize((side, side), Image.Resampling.BICUBIC).save(stream, "PNG")
        held_out = number % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
        read.append(Digit(name=f"digit-{number:04d}", png=stream.getvalue(), answer=WORDS[target], held_out=held_out))
    return read


def write_digits(digits: Sequence[Digit], shards: Path, held_out: Path) -> tuple[int, int]:
    """Write `train/*.tar` and `valid/*.tar` into `shards`, and the held-out images into the folder `held_out` as well.

    Beside those lies `answers.json`, from file name to answer. Returns the number of samples in each part.
    """
    parts = [[one for one in digits if one.held_out is wanted] for wanted in (False, True)]
    for name, part in zip(PARTS, parts, strict=True):
        folder = shards / name
        folder.mkdir(parents=True, exist_ok=True)
        for first in range(0, len(part), SHARD):
            _write_shard(folder / f"shard-{first // SHARD:06d}.tar", part[first : first + SHARD])
    held_out.mkdir(parents=True, exist_ok=True)
    for one in parts[1]:
        (held_out / f"{one.name}.png").write_bytes(one.png)
    answers = {f"{one.name}.png": one.answer for one in parts[1]}
    (held_out / "answers.json").write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")
    return len(parts[0]), len(parts[1])


def read_held_out(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every held-out image file with its answer."""
    answers: dict[str, str] = json.loads((folder / "answers.json").read_text(encoding="utf-8"))
    for name, answer in answers.items():
        yield folder / name, answer


def _write_shard(file: Path, digits: Sequence[Digit]) -> None:
    """A plain tar archive; the members of one key, `digit-0000.png` and `digit-0000.json`, are one sample."""
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as archive:
        for one in digits:
            for extension, content in (("png", one.png), ("json", json.dumps(one.row).encode())):
                header = tarfile.TarInfo(f"{one.name}.{extension}")
                header.size = len(content)
                archive.addfile(header, io.BytesIO(content))
