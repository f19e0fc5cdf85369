"""What --load, --save and their companions mean for a run that exists already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loongforge.core.checkpoint.directory import RunDirectory


def test_keep_last_deletes_older_checkpoints_once_the_new_one_is_complete(tied: Any, tmp_path: Path) -> None:
    tied.train(tmp_path / "run", ["--save-interval", "1", "--keep-last", "2"])
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step_00000005",
        "step_00000006",
    ]


def test_finetune_takes_the_weights_and_nothing_else(tied: Any, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    said = tied.train(run, ["--load", str(whole), "--finetune", "--train-iters", "3", "--seed", "5"])
    assert "Starting at step 0 with the weights of" in said
    assert [(row[0], row[3]) for row in tied.curve(run)] == [(1, 4), (2, 8), (3, 12)]
    # the same weights through a Hugging Face export: the same run, bit for bit
    exported = tied.back(whole, tmp_path / "exported", 6)
    tied.train(exported, ["--save-hf", "true"])
    other = tmp_path / "other"
    tied.train(other, ["--load", str(exported / "hf"), "--train-iters", "3", "--seed", "5"])
    assert tied.curve(other) == tied.curve(run)


def test_the_same_finetune_command_goes_on_after_a_kill(tied: Any, whole: Path, tmp_path: Path) -> None:
    flags = ["--load", str(whole), "--finetune"]
    run = tmp_path / "run"
    tied.train(run, flags)
    again = tied.back(run, tmp_path / "again")
    assert "Resuming at step 3" in tied.train(again, flags)
    assert tied.curve(again) == tied.curve(run)
    error = tied.refused(run, ["--load", str(run), "--finetune"])
    assert "--finetune begins a new run, but --save" in error


def test_no_load_optim_starts_the_moments_at_zero_and_only_once(tied: Any, whole: Path, tmp_path: Path) -> None:
    start = ["--config-file", str(whole / "config.yaml"), "--load", str(RunDirectory(whole).path(3))]
    flags = [*start, "--no-load-optim", "--train-iters", "9"]
    run = tmp_path / "run"
    assert "The optimizer state was not loaded: its moments start at zero." in tied.train(run, flags)
    assert tied.curve(run)[0][:3] == tied.curve(whole)[3][:3]  # before the first update nothing differs
    assert tied.curve(run)[2] != tied.curve(whole)[5]
    again = tied.back(run, tmp_path / "again", 6)
    assert "moments start at zero" not in tied.train(again, flags)
    assert tied.curve(again) == tied.curve(run)


def test_a_run_saved_without_optimizer_state_says_so_on_resume(tied: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tied.train(run, ["--no-save-optim"])
    again = tied.back(run, tmp_path / "again")
    assert "The optimizer state was not loaded" in tied.train(again, ["--use-distributed-optimizer"])
    assert len(tied.curve(again)) == 6


def test_no_checkpoint_where_load_points(tied: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    empty = ["--load", str(tmp_path / "empty"), "--model-name", "qwen3_0_6b"]
    geometry = ["--num-layers", "2", "--hidden-size", "32", "--ffn-hidden-size", "48", "--num-attention-heads", "2"]
    flags = [*empty, *geometry, "--num-query-groups", "2", "--vocab-size", "64"]
    assert "Starting at step 0 with fresh weights." in tied.train(tmp_path / "run", flags)
    error = tied.refused(tmp_path / "other", [*flags, "--exit-on-missing-checkpoint"], 2)
    assert "neither a run of LoongForge" in error


def test_a_converted_checkpoint_goes_on_without_finetune(tied: Any, whole: Path, tmp_path: Path) -> None:
    from loongforge.ckpt.convert.work import to_checkpoint
    from loongforge.core.testing import run_distributed

    config = tied.config(tmp_path / "converted", ["--no-save-optim"])
    run_distributed(lambda _: to_checkpoint(config), 1)
    run = tmp_path / "run"
    assert "Resuming at step 0" in tied.train(run, ["--load", str(tmp_path / "converted")])
    assert tied.curve(run) == tied.curve(whole)


def test_a_resumed_run_follows_its_configuration_not_the_one_it_was_saved_with(
    tied: Any, whole: Path, tmp_path: Path
) -> None:
    longer = tied.back(whole, tmp_path / "longer")
    tied.train(longer, ["--train-iters", "8"])
    assert [row[0] for row in tied.curve(longer)] == [*range(1, 9)]
    for name, flags in {
        "lr": ["--lr", "2e-2"],
        "beta2": ["--adam-beta2", "0.9"],
        "decay": ["--weight-decay", "0.5"],
    }.items():
        run = tied.back(whole, tmp_path / name)
        tied.train(run, flags)
        assert tied.curve(run)[3][:2] == tied.curve(whole)[3][:2]
        assert tied.curve(run)[5] != tied.curve(whole)[5], name


@pytest.mark.parametrize("flags", [[], ["--train-iters", "5"]])
def test_a_finished_run_trains_nothing_and_writes_a_lost_export(
    flags: list[str], tied: Any, whole: Path, tmp_path: Path
) -> None:
    run = tied.back(whole, tmp_path / "run", 6)
    said = tied.train(run, [*flags, "--save-hf", "true"])
    assert "steps are done: nothing to train." in said
    assert tied.curve(run) == tied.curve(whole)
    assert tied.export(run)
