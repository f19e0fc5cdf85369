"""Sounds among the media of a conversation, for a composition that hears; the others refuse them."""

from __future__ import annotations

import json
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loongforge.core.data.contract import Placed, VisualItem
from loongforge.core.errors import DataError
from loongforge.data.media import Medium, decode, measure
from loongforge.data.shards import write_shards
from loongforge.data.tokenizer import HFTokenizer
from loongforge.data.vlm import open_vlm

RATE, WINDOW = 8000, 400


@dataclass(frozen=True)
class Ear:
    """One feature for every whole window of samples, beside the sight of another processor."""

    sight: Any
    sampling_rate: int = RATE
    sound_text = "<see><frame><seen>"  # a tokenizer that has a token for sounds would be one more fixture

    image_text = "<see><pad><seen>"
    video_text = "<no video>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # copies ask before there is a field
        return getattr(self.sight, name)

    def sound(self, samples: np.ndarray) -> Placed:
        windows = len(samples) // WINDOW
        return self._placed(windows, samples[: windows * WINDOW].reshape(windows, WINDOW))

    def sound_size(self, samples: int) -> Placed:
        return self._placed(samples // WINDOW, None)

    def _placed(self, windows: int, patches: np.ndarray | None) -> Placed:
        item = VisualItem(grid=(1, windows, 1), features=windows, placeholder="<frame>", patches=patches)
        return Placed(pieces=("<see>", item, "<seen>"))


def write_sound(path: Path, samples: np.ndarray, rate: int = RATE) -> np.ndarray:
    """A WAV file of int16 `[samples, channels]`; its first channel as float."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return samples[:, 0].astype(np.float32) / 32768


@pytest.fixture
def waves(tmp_path: Path) -> dict[str, np.ndarray]:
    """Samples of `a.wav` and `b.wav`, of unequal length."""
    draw = np.random.default_rng(0)
    sizes = {"a.wav": 3 * WINDOW + 7, "b.wav": 2 * WINDOW}
    return {name: write_sound(tmp_path / name, draw.integers(-20000, 20000, (size, 1))) for name, size in sizes.items()}


def test_samples_are_those_of_the_file(waves: dict[str, np.ndarray], processor: Any, tmp_path: Path) -> None:
    ear = Ear(processor)
    medium = Medium(kind="audio", path=str(tmp_path / "a.wav"))
    (item,), (size,) = decode(medium, ear).items, measure(medium, ear).items
    assert item.grid == size.grid == (1, 3, 1)
    assert item.patches is not None
    np.testing.assert_array_equal(item.patches.ravel(), waves["a.wav"][: 3 * WINDOW])


def test_another_rate_and_another_channel(processor: Any, tmp_path: Path) -> None:
    """Two equal channels are one sound, and a slow tone stays the tone that it was."""
    tone = 16000 * np.sin(2 * np.pi * 50 * np.arange(2 * RATE) / (2 * RATE))  # one second
    write_sound(tmp_path / "tone.wav", np.stack([tone, tone], 1), 2 * RATE)
    (item,) = decode(Medium(kind="audio", path=str(tmp_path / "tone.wav")), Ear(processor)).items
    assert item.patches is not None
    assert item.grid == (1, RATE // WINDOW, 1)
    wanted = tone[::2].astype(np.float32) / 32768
    assert np.abs(item.patches.ravel() - wanted)[WINDOW:-WINDOW].max() < 2e-3, "of 0.5; the filter's ends left out"


@pytest.mark.parametrize("form", ["marks", "parts", "shards"])
def test_features_stand_where_the_sound_was(
    form: str, waves: dict[str, np.ndarray], make_request: Any, seeing_tokenizer_dir: Path, processor: Any,
    write_rows: Any, tmp_path: Path,
) -> None:  # fmt: skip
    asked: Any = "<audio>and <audio>?"
    if form == "parts":
        asked = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "and "}]
        asked += [{"type": "audio"}, {"type": "text", "text": "?"}]
    listed = ["b.wav"] if form == "parts" else ["a.wav", "b.wav"]
    row = {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "a forge"}]}
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "audios": listed}])
    if form == "shards":
        media = {name: (tmp_path / name).read_bytes() for name in listed}
        write_shards([("one", {"json": json.dumps(row).encode(), **media})], tmp_path / "shards")
        path = tmp_path / "shards"
    request = make_request(
        tmp_path / "cache", paths=(str(path),), tokenizer_path=str(seeing_tokenizer_dir), seq_length=64, num_samples=1,
        shuffle=False, visual=Ear(processor), position_rank=3,
    )  # fmt: skip
    sample = open_vlm(request)[0]
    tokenizer = HFTokenizer(seeing_tokenizer_dir)
    heard = [f"<see>{'<frame>' * count}<seen>" for count in (3, 2)]
    said = f"<|im_start|>user\n{heard[0]}and {heard[1]}?<|im_end|>\n<|im_start|>assistant\na forge<|im_end|>\n"
    tokens = tokenizer.encode(said)
    assert sample["tokens"][: len(tokens) - 1].tolist() == tokens[:-1]
    found = dict(sample)
    assert found["grid"].tolist() == [[1, 3, 1], [1, 2, 1]]
    assert (
        found["visual_positions"].tolist()
        == np.flatnonzero(np.array(tokens) == tokenizer.encode("<frame>")[0]).tolist()
    )
    every = np.concatenate([waves["a.wav"][: 3 * WINDOW], waves["b.wav"]])
    np.testing.assert_array_equal(found["pixels"].ravel(), every)


def test_a_model_that_does_not_hear_refuses(
    waves: dict[str, np.ndarray], make_request: Any, seeing_tokenizer_dir: Path, processor: Any, write_rows: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    row = {"messages": [{"role": "user", "content": "<audio>?"}, {"role": "assistant", "content": "x"}]}
    path = write_rows(tmp_path / "rows.jsonl", [{**row, "audios": ["a.wav"]}])
    request = make_request(
        tmp_path / "cache", paths=(str(path),), tokenizer_path=str(seeing_tokenizer_dir), seq_length=64, num_samples=1,
        visual=processor, position_rank=3,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"rows\.jsonl:1: it lists audios, and this model hears none"):
        open_vlm(request)
    with pytest.raises(DataError, match="prepares no sounds"):
        decode(Medium(kind="audio", path=str(tmp_path / "a.wav")), processor)


def test_what_is_no_sound(processor: Any, tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"RIFFnothing")
    with pytest.raises(DataError, match=r"audio .*x\.wav: not a readable audio"):
        measure(Medium(kind="audio", path=str(tmp_path / "x.wav")), Ear(processor))
