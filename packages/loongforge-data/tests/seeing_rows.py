"""Rows and shards with images, as tests of conversations that see need them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from loongforge.core.data.loader import Loader, LoaderShape
from loongforge.data.shards import write_shards
from loongforge.data.vlm import VisualSource


def asks(*names: str, question: str = "what", answer: str = "a forge") -> dict[str, Any]:
    """A row whose question shows images."""
    said = "<image>" * len(names) + question
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(names)}


def rows_of(count: int) -> list[dict[str, Any]]:
    """Rows of no, one and two images and a second turn."""
    rows = []
    for number in range(count):
        names = [f"{(number + k) % 6}.png" for k in range(number % 3)]
        row = asks(*names, question=f"q{number}", answer=" ".join(["forge"] * (1 + number % 4)))
        if number % 4 == 3:
            row["messages"] += [{"role": "user", "content": "and <image>?"}, {"role": "assistant", "content": "too"}]
            row["images"] += ["photo.jpg"]
        rows.append(row)
    return rows


def pack(folder: Path, samples: dict[str, tuple[Any, dict[str, str]]], into: str = "shards") -> Path:
    def members():
        for key, (content, files) in samples.items():
            media = {extension: (folder / name).read_bytes() for extension, name in files.items()}
            yield key, {"json": json.dumps(content).encode(), **media}

    write_shards(members(), folder / into, maxcount=2)
    return folder / into


def batches(source: VisualSource, workers: int, start: int = 0) -> list[dict[str, Any]]:
    shape = LoaderShape(
        micro_batch_size=2, num_microbatches=1, num_workers=workers, start_sample=start, position_rank=3, visual=True
    )
    with Loader(source, shape) as loader:
        return [{name: np.asarray(values) for name, values in batch.items()} for batch in loader]
