"""The third-party encoder of docs/add-an-encoder.md: listed, trained, exported, loaded again, equal on every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SHAPE = ("--fp32", "--seq-length", "256", "--train-iters", "3", "--global-batch-size", "4", "--lr", "1e-3")
MOCK = ("data.source=mock", "--max-pixels", "12544", "data.num_workers=0")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "tp2": ("--tensor-model-parallel-size", "2"),
    "tp2, encoder tp1": ("--tensor-model-parallel-size", "2", "+model.image_encoder.tensor-model-parallel-size=1"),
    "pp2, ahead": ("--pipeline-model-parallel-size", "2", "--enable-full-hetero-dp"),
}
TOLERANCE = 2e-6
"""Relative, of losses and gradient norms in fp32; sums are rounded (6e-8) in another order."""

Shell = Callable[..., str]


@pytest.fixture(scope="module")
def site(site_of: Callable[[str], Path]) -> Path:
    """acme-vision as an installer leaves it."""
    return site_of("acme_vision")


@pytest.fixture(scope="module")
def shell(site: Path, shell_at: Callable[[Path], Shell]) -> Shell:
    """`loongforge` where acme-vision is installed."""
    return shell_at(site)


def numbers(run: Path) -> list[float]:
    """Loss and gradient norm of every step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def exported(shell: Shell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to start from, written by a run in one process."""
    folder = tmp_path_factory.mktemp("first")
    model = ("--model-name", "acme-vl-tiny", "--save", "run", "--save-hf", "true")
    shell("train", *model, *SHAPE, *MOCK, cwd=folder)
    return folder / "run/hf"


def test_it_is_listed_and_shown(shell: Shell, tmp_path: Path) -> None:
    rows = {row["name"]: row for row in json.loads(shell("list", "models", "--json", cwd=tmp_path))}
    assert (rows["acme_vit"]["state"], rows["acme_vit"]["owner"]) == ("ready", "acme-vision 0.3.0")
    assert "acme_vl_tiny" in shell("show", "compositions", "acme_vl", cwd=tmp_path)


def test_every_layout_has_the_numbers_of_one_process(shell: Shell, exported: Path, tmp_path: Path) -> None:
    start = ("--model-name", "acme-vl-tiny", "--load", exported, *SHAPE, *MOCK)
    shell("train", *start, "--save", "plain", cwd=tmp_path)
    expected = numbers(tmp_path / "plain")
    assert len(set(expected)) == 6, "the model changes"
    for name, flags in LAYOUTS.items():
        shell("train", *start, "--nproc-per-node", "2", *flags, "--save", name, cwd=tmp_path)
        assert numbers(tmp_path / name) == pytest.approx(expected, rel=TOLERANCE), name


def test_it_goes_before_another_foundation(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "defaults:\n"
        "- models/image_encoder@model.image_encoder: acme_vit_tiny\n"
        "- models/image_projector@model.image_projector: qwen_mlp_adapter\n"
        "- models/qwen3@model.foundation: qwen3_0_6b\n"
        "model:\n  model_type: acme_vl\n"
    )
    plan = json.loads(shell("plan", "--config-file", "run.yaml", "--train-iters", "1", "--json", cwd=tmp_path))
    assert [one["family"] for one in plan["components"]] == ["acme_vit", "qwen_mlp_adapter", "qwen3"]


def test_patches_are_in_the_order_of_merged_squares(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    from acme_vision.processor import AcmeProcessor  # pyright: ignore[reportMissingImports]

    processor = AcmeProcessor(patch_size=2, position_rank=3, max_pixels=1000)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)  # needs no resizing
    (item,) = processor.image(pixels).items
    assert (item.grid, item.features) == ((1, 4, 6), 6)
    assert processor.image_size(8, 12).items[0].grid == item.grid
    places = [
        (2 * down + y, 2 * across + x)
        for down in range(2) for across in range(3) for y in range(2) for x in range(2)
    ]  # fmt: skip
    for patch, (row, column) in zip(item.patches, places, strict=True):
        cut = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_allclose(patch, (cut / 127.5 - 1).transpose(2, 0, 1).ravel(), atol=1e-6)
    (small,) = processor.image_size(800, 1200).items
    assert small.grid == (1, 12, 18)  # 24 x 36 pixels: at most 1000 of them, the same shape


def test_a_video_is_refused(shell: Shell, tmp_path: Path) -> None:
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), number, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    row = {"messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "!"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps({**row, "videos": ["a.mp4"]}))
    words = ("--model-name", "acme-vl-tiny", "--training-phase", "sft", "--data-path", "rows.jsonl", *SHAPE)
    out = shell("train", *words, "--hf-tokenizer-path", tokenizer(tmp_path), cwd=tmp_path, code=4)
    assert "sees still images, not videos" in out, out


def tokenizer(folder: Path) -> str:
    """A tokenizer of bytes, with the marks of a chat and an image."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|end|>", "<|image_pad|>")])
    made.save(str(folder / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}<|end|>{% endfor %}"
    config = {"eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)
