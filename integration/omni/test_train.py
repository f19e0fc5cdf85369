"""`loongforge train` on image files: killed and resumed, on other layouts, exported, and judged by transformers."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_line
import omni_run
import pytest
import tiny_files
import torch
from PIL import Image

from loongforge.core.checkpoint.directory import RunDirectory, read_manifest
from loongforge.core.config.resolve import resolve
from loongforge.core.testing import run_distributed

STEPS, EVERY = 8, 2
"""Steps of a run, and between its checkpoints."""
SHAPE = [
    "--training-phase", "sft", "--fp32", "--seq-length", "192", "--micro-batch-size", "1", "--global-batch-size", "4",
    "--train-iters", STEPS, "--save-interval", EVERY, "--lr", "3e-3", "--min-lr", "3e-4", "--weight-decay", "0.1",
    "--lr-warmup-iters", "2", "--eval-iters", "1", "--eval-interval", "4", "--num-workers", "0",
    "--min-pixels", tiny_files.LIMITS["shortest_edge"], "--max-pixels", tiny_files.LIMITS["longest_edge"],
    "--video-min-pixels", "64", "--video-max-pixels", "512",
]  # fmt: skip
TP2 = ["--tensor-model-parallel-size", "2", "+model.image_encoder.tensor-model-parallel-size=1"]
AHEAD = ["--pipeline-model-parallel-size", "2", "--enable-full-hetero-dp"]


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What a user has before training."""

    model: Path
    """Weights, tokenizer and processor as transformers saves them."""
    data: Path
    """`train.jsonl`, `valid.jsonl` and the files they name; the same rows in `shards`."""

    def words(self, save: Path, *more: object, data: str = "train.jsonl") -> list[str]:
        """A command line without its verb."""
        files = ["--data-path", self.data / data, "--valid-data-path", self.data / "valid.jsonl"]
        words = ["--load", self.model, "--save", save, "data.data_cache_path=" + str(save / "cache"), *SHAPE, *files]
        return [str(word) for word in (*words, *more)]  # of a flag that comes twice the later one counts


@pytest.fixture(scope="module")
def folder(megatron: Any, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A tiny Qwen3-VL whose tokenizer knows bytes, and conversations about pictures."""
    path = tmp_path_factory.mktemp("train")
    tiny_files.make_model(path / "model")
    tiny_files.make_data(path / "data")
    return Folder(model=path / "model", data=path / "data")


def train(words: list[str], world: int = 1) -> str:
    """Train in forked workers, which share one import of megatron-core; what rank 0 printed."""
    config = resolve(words, note=lambda _: None)

    def work(worker: Any) -> str:
        from loongforge.core.run import train

        said = io.StringIO()
        with redirect_stdout(said):
            train(config)
        return said.getvalue()

    return run_distributed(work, world, timeout=120)[0]


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What must be equal to the bit: step, loss, gradient norm, held-out loss, samples."""
    names = ("step", "loss", "grad_norm", "valid_loss", "consumed_samples")
    return [tuple(row.get(name) for name in names) for row in command_line.metrics(run)]


@pytest.fixture(scope="module")
def whole(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, on one process; never changed by a test."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(folder.words(run, "--save-hf"))
    return run


@pytest.fixture(scope="module")
def killed(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as the command starts it, killed behind its first checkpoint; never changed by a test."""
    run = tmp_path_factory.mktemp("killed") / "run"
    words = [command_line.COMMAND, "train", *folder.words(run)]
    with subprocess.Popen(
        words, cwd=folder.data, env=command_line.ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 120
        while RunDirectory(run).latest() is None:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr and process.stderr.read().decode()[-2000:]
            time.sleep(0.002)
        command_line.kill_group(process, signal.SIGKILL)
    assert RunDirectory(run).steps()[-1] < STEPS, "it was killed before its end"
    return run


def resumed(killed: Path, folder: Folder, run: Path, world: int = 1, *flags: object) -> str:
    """Go on from a copy of the killed run."""
    shutil.copytree(killed, run)
    latest = RunDirectory(killed).latest()
    assert latest
    said = train(folder.words(run, *flags), world)
    assert f"Resuming at step {read_manifest(latest).step}," in said
    return said


def test_it_learns(whole: Path) -> None:
    losses = command_line.losses(whole)
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0]
    assert [step for step, _, _, held_out, _ in curve(whole) if held_out is not None] == [4, 8]


def test_resumed_as_it_was_is_the_same_to_the_bit(killed: Path, whole: Path, folder: Folder, tmp_path: Path) -> None:
    resumed(killed, folder, tmp_path / "run", 1, "--save-hf")
    assert curve(tmp_path / "run") == curve(whole)
    one, two = omni_run.read(tmp_path / "run" / "hf"), omni_run.read(whole / "hf")
    assert one.keys() == two.keys()
    assert [name for name, tensor in one.items() if not torch.equal(tensor, two[name])] == []


@pytest.mark.parametrize(
    ("world", "flags"),
    [(2, TP2), (2, []), (4, [*TP2, *AHEAD])],
    ids=["tp2, encoder tp1", "two replicas", "tp2 x pp2, ahead"],
)
def test_resumed_on_another_layout(
    world: int, flags: list[str], killed: Path, whole: Path, folder: Folder, tmp_path: Path
) -> None:
    resumed(killed, folder, tmp_path / "run", world, *flags)
    for ours, theirs in zip(curve(tmp_path / "run"), curve(whole), strict=True):
        assert (ours[0], ours[-1]) == (theirs[0], theirs[-1])
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
        assert (ours[3] is None) == (theirs[3] is None)
        assert ours[3] is None or ours[3] == pytest.approx(theirs[3], rel=1e-5)


def test_two_workers_read_the_same_from_shards(whole: Path, folder: Folder, tmp_path: Path) -> None:
    train(folder.words(tmp_path / "run", "--num-workers", "2", data="shards"))
    assert curve(tmp_path / "run") == curve(whole)


def test_layouts_that_pack_otherwise(folder: Folder, tmp_path: Path) -> None:
    """Context and sequence parallelism lengthen packed segments: unpacked, their steps see the same samples."""
    flags = ["data.packing=false", "--train-iters", "2", "--eval-interval", "2", "--lr-warmup-iters", "1"]
    train(folder.words(tmp_path / "one", *flags))
    layouts = {"cp": ["--context-parallel-size", "2", *AHEAD[-1:]], "sp": [*TP2, "--sequence-parallel"]}
    for name, layout in layouts.items():
        train(folder.words(tmp_path / name, *flags, *layout), 2)
        for ours, theirs in zip(curve(tmp_path / name), curve(tmp_path / "one"), strict=True):
            assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
            assert (ours[3] or 0) == pytest.approx(theirs[3] or 0, rel=1e-5)


def test_transformers_says_the_same_of_the_export(whole: Path, folder: Folder) -> None:
    """The exported directory holds all that transformers needs; its loss on the held-out files is the one we measured.

    Its processor reads the same images and writes the same conversations.
    """
    import transformers as hf

    directory = whole / "hf"
    model = hf.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    processor = hf.AutoProcessor.from_pretrained(directory)
    # Of its two ways to resize this is the one without a second rounding.
    processor.image_processor = hf.AutoImageProcessor.from_pretrained(directory, backend="pil")
    total, count = 0.0, 0
    for line in (folder.data / "valid.jsonl").read_text().splitlines():
        row = json.loads(line)
        user, assistant = (message["content"] for message in row["messages"])
        parts = [{"type": "image"} for _ in row["images"]] + [{"type": "text", "text": user.replace("<image>", "")}]
        turns: list[Any] = [{"role": "user", "content": parts}]
        asked = processor.apply_chat_template(turns, add_generation_prompt=True)
        text = processor.apply_chat_template([*turns, {"role": "assistant", "content": assistant}])
        assert text.startswith(asked)
        images = [Image.open(folder.data / name).convert("RGB") for name in row["images"]] or None
        inputs = processor(text=[text], images=images, return_tensors="pt")
        learnt = len(processor.tokenizer(text[len(asked) :].removesuffix("\n"))["input_ids"])
        tail = len(processor.tokenizer("\n")["input_ids"])
        ids = inputs["input_ids"][0]
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        wanted = slice(len(ids) - tail - learnt, len(ids) - tail)
        losses = torch.nn.functional.cross_entropy(logits[wanted.start - 1 : wanted.stop - 1], ids[wanted])
        total, count = total + float(losses) * learnt, count + learnt
    measured = [held_out for _, _, _, held_out, _ in curve(whole) if held_out is not None][-1]
    assert total / count == pytest.approx(measured, rel=1e-5)
