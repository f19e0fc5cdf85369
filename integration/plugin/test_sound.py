"""An encoder of sounds in a wheel of a third party: `<audio>` in a conversation, equal on another layout, exported."""

from __future__ import annotations

import json
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

Shell = Callable[..., str]
SHAPE = (
    "--training-phase", "sft", "--fp32", "--seq-length", "96", "--train-iters", "2", "--global-batch-size", "4",
    "--lr", "1e-3", "--data-path", "rows.jsonl", "data.num_workers=0", "data.packing=false",
)  # fmt: skip
SPREAD = ("--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--enable-full-hetero-dp")
"""The foundation over two ranks, the ear whole on each."""
TOLERANCE = 2e-6
"""Relative, of losses and gradient norms in fp32; sums are rounded (6e-8) in another order."""


@pytest.fixture(scope="module")
def shell(site_of: Callable[[str], Path], shell_at: Callable[[Path], Shell]) -> Shell:
    """`loongforge` where acme-sound is installed."""
    return shell_at(site_of("acme_sound"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tones of unequal length, conversations about none, one and two of them, and a tokenizer of bytes."""
    path = tmp_path_factory.mktemp("sounds")
    rows = []
    for number in range(8):
        names = [f"{number}-{which}.wav" for which in range(number % 3)]
        for which, name in enumerate(names):
            tone = np.sin(np.arange(400 + 170 * number + 90 * which) * (0.05 + 0.03 * which))
            with wave.open(str(path / name), "wb") as file:
                file.setparams((1, 2, 8000, 0, "NONE", ""))
                file.writeframes((tone * 20000).astype("<i2").tobytes())
        asked = "<audio>" * len(names) + "How many?"
        said = [{"role": "user", "content": asked}, {"role": "assistant", "content": str(len(names))}]
        rows.append({"messages": said, "audios": names})
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer(path)
    return path


def tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens([AddedToken(mark, special=True) for mark in ("<|end|>", "<|sound|>")])
    made.save(str(path / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}<|end|>{% endfor %}"
    config = {"eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def numbers(run: Path) -> list[float]:
    """Loss and gradient norm of every step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss", "grad_norm")]


def test_it_hears_the_same_on_another_layout(shell: Shell, folder: Path) -> None:
    first = ("--model-name", "acme-hears-tiny", "--hf-tokenizer-path", folder, *SHAPE)
    out = shell("train", *first, "--save", "first", "--save-hf", "true", cwd=folder)
    assert "audios" in out, "the report counts them"
    exported = folder / "first/hf"
    assert json.loads((exported / "image_encoder/config.json").read_text())["model_type"] == "acme_ear"
    start = (*first, "--load", exported)
    shell("train", *start, "--save", "plain", cwd=folder)
    expected = numbers(folder / "plain")
    assert len(set(expected)) == 4, "the model changes"
    shell("train", *start, *SPREAD, "--save", "spread", cwd=folder)
    assert numbers(folder / "spread") == pytest.approx(expected, rel=TOLERANCE)
