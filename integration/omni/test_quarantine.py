"""Corrupt images in a real run: no rank is alone with one, and a killed run goes on elsewhere with the same samples."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import command_line
import pytest
import tiny_files

from loongforge.core.checkpoint.directory import RunDirectory, read_manifest
from loongforge.core.config.resolve import resolve
from loongforge.core.errors import ForgeError
from loongforge.core.testing import run_distributed

STEPS = 8
SHAPE = [
    "--training-phase", "sft", "--fp32", "--seq-length", "192", "--micro-batch-size", "1", "--global-batch-size", "4",
    "--train-iters", STEPS, "--save-interval", 2, "--lr", "1e-3", "--min-lr", "1e-4", "--weight-decay", "0.1",
    "--min-pixels", tiny_files.LIMITS["shortest_edge"], "--max-pixels", tiny_files.LIMITS["longest_edge"],
    "--video-min-pixels", "64", "--video-max-pixels", "512",
]  # fmt: skip
BROKEN = {1: "0-0.jpg", 11: "10-0.jpg"}
"""Lines of `train.jsonl` and an image of each that ends in the middle; its header is whole."""
PP2 = ["--pipeline-model-parallel-size", "2", "--num-workers", "0"]
"""The second stage computes the loss and never looks at an image."""


@pytest.fixture(scope="module")
def folder(megatron: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-VL in `model`, and in `data` rows about images, of which two are cut."""
    path = tmp_path_factory.mktemp("corrupt")
    tiny_files.make_model(path / "model")
    tiny_files.make_data(path / "data")
    for name in BROKEN.values():
        content = (path / "data" / name).read_bytes()
        (path / "data" / name).write_bytes(content[:-60])
    return path


def words(folder: Path, save: Path, *more: object) -> list[str]:
    files = ["--load", folder / "model", "--data-path", folder / "data/train.jsonl", "--save", save]
    return [str(word) for word in (*files, *SHAPE, *more)]


def ended(argv: list[str], world: int) -> list[str]:
    """Train in forked workers; the error of each, empty without one."""
    config = resolve(argv, note=lambda _: None)

    def work(worker: Any) -> str:
        from loongforge.core.run import train

        try:
            train(config)
        except ForgeError as error:
            return str(error)
        return ""

    return run_distributed(work, world, timeout=120)


def named(run: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    return [(row["row"], row["step"], row["sample"]) for row in rows]


def killed(argv: list[str], run: Path, folder: Path) -> None:
    """The command, killed with every worker behind its second checkpoint."""
    with subprocess.Popen(
        [command_line.COMMAND, "train", *argv], cwd=folder, env=command_line.ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 150
        while len(RunDirectory(run).steps()) < 2:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr and process.stderr.read().decode()[-2000:]
            time.sleep(0.002)
        command_line.kill_group(process, signal.SIGKILL)
    assert RunDirectory(run).steps()[-1] < STEPS, "it was killed before its end"


def test_a_killed_run_goes_on_on_another_layout(folder: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert ended(words(folder, whole, "--max-bad-samples", 2, "--num-workers", 0), 1) == [""]
    killed(
        words(folder, run, "--max-bad-samples", 2, "--num-workers", 2, "--nproc-per-node", 2, "--use-vlm-dp-balance"),
        run,
        folder,
    )
    latest = RunDirectory(run).latest()
    assert latest is not None
    known = dict(read_manifest(latest).quarantine)
    assert known, "some were met before"
    assert len(json.dumps(known)) < 1000
    assert ended(words(folder, run, "--max-bad-samples", 2, *PP2), 2) == ["", ""]
    assert sorted(row for row, *_ in named(whole)) == sorted(BROKEN)
    assert named(run) == named(whole)
    here, there = command_line.metrics(run), command_line.metrics(whole)
    for name in ("step", "loss_tokens", "consumed_samples"):
        assert [row[name] for row in here] == [row[name] for row in there], name
    assert [row["loss"] for row in here] == pytest.approx([row["loss"] for row in there], rel=1e-5)
    assert there[-1]["quarantined"] == 2
    changed = folder / "data/changed.jsonl"
    changed.write_text("".join((folder / "data/train.jsonl").read_text().splitlines(keepends=True)[:-1]))
    shutil.rmtree(run / "hf", ignore_errors=True)
    (said,) = ended(words(folder, run, "--data-path", changed, "--max-bad-samples", 2, "--num-workers", 0), 1)
    assert "data.0" in said


def test_over_budget_every_stage_ends_with_the_same_words(folder: Path, tmp_path: Path) -> None:
    one, other = ended(words(folder, tmp_path / "run", "--max-bad-samples", 1, *PP2), 2)
    assert one == other
    assert "2 bad, --max-bad-samples 1 allows no more" in one
    assert any(f"{name}: not a readable image" in one for name in BROKEN.values())
