"""Stages: finished ones are taken up, interrupted ones go on, changed ones start over."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import pytest

from loongforge.core.errors import PREEMPTED_EXIT_CODE
from loongforge.core.quickstart import Stages, training
from loongforge.core.quickstart.training import TrainingStopped, spoken, train


def run(folder: Path, depends: int, *, fail: bool = False) -> tuple[str, bool]:
    """Run one stage that writes a file; what the file holds, and whether the stage was taken up."""
    owned, before = folder / "owned", []

    def work() -> dict[str, int]:
        with owned.open("a") as stream:
            stream.write(str(depends))
        if fail:
            raise KeyboardInterrupt
        return {"depends": depends}

    stages = Stages(folder / "stages", lambda _, finished_before: before.append(finished_before))
    try:
        assert stages.run("one", "One", [depends], [owned], work) == {"depends": depends} == stages.facts("one")
    except KeyboardInterrupt:
        assert fail
    return owned.read_text(), before[0]


def test_a_finished_stage_is_taken_up(tmp_path: Path) -> None:
    assert run(tmp_path, 1) == ("1", False)
    assert run(tmp_path, 1) == ("1", True)


def test_an_interrupted_stage_keeps_what_it_wrote(tmp_path: Path) -> None:
    assert run(tmp_path, 1, fail=True) == ("1", False)
    assert run(tmp_path, 1) == ("11", False)


def test_other_settings_start_over(tmp_path: Path) -> None:
    run(tmp_path, 1)
    assert run(tmp_path, 2) == ("2", False)


def test_a_stage_whose_files_are_gone_runs_again(tmp_path: Path) -> None:
    run(tmp_path, 1)
    (tmp_path / "owned").unlink()
    assert run(tmp_path, 1) == ("1", False)


def test_a_stage_depends_on_those_before_it(tmp_path: Path) -> None:
    ran: list[str] = []
    for first in (1, 1, 2):
        stages = Stages(tmp_path / "stages", lambda *_: None)
        for name, depends in (("first", first), ("second", 0)):
            stages.run(name, name, depends, [], lambda name=name: ran.append(name) or {})
    assert ran == ["first", "second", "first", "second"]


def test_the_printed_command_is_the_one_that_runs() -> None:
    arguments = ["--data-path", "a folder/train.jsonl", *(word for n in range(20) for word in (f"--flag-{n}", str(n)))]
    text = spoken(arguments)
    assert shlex.split(text.replace("\\\n", "")) == ["loongforge", "train", *arguments]
    assert max(map(len, text.splitlines())) <= 110


def test_a_failed_training_shows_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "logs/train.txt"
    with pytest.raises(TrainingStopped, match=r"exit code 2(.|\n)*train-itters") as stopped:
        train(["--train-itters", "3"], log)
    assert stopped.value.exit_code == 2
    assert "train-itters" in log.read_text()


def test_a_preempted_training_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LAUNCH", f"import sys; sys.exit({PREEMPTED_EXIT_CODE})")
    with pytest.raises(TrainingStopped, match="run the same command again") as stopped:
        train([], tmp_path / "log.txt")
    assert stopped.value.exit_code == PREEMPTED_EXIT_CODE


def test_a_terminated_quickstart_lets_the_training_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM reaches the training, which ends in its own time."""
    child = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    monkeypatch.setattr(training, "LAUNCH", "import time; time.sleep(1);" + child)
    began = time.monotonic()
    with pytest.raises(TrainingStopped, match="saved"):
        train([], tmp_path / "log.txt")
    assert time.monotonic() - began < 30
