"""`loongforge plan` and `loongforge train --dry-run`: output, exits, and no torch."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import plan_tiny as tiny
import pytest

from loongforge.core.cli import plan, train
from loongforge.core.config import resolve
from loongforge.core.errors import ConfigError, DataError, PlanError


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch):
    """Make the arguments mean the small decoder; answers with the arguments that were resolved."""
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOONGFORGE_PLATFORM", "cpu")
    seen: list[list[str]] = []

    def mean(**options: Any) -> list[list[str]]:
        def answer(argv: list[str]) -> Any:
            seen.append(argv)
            return tiny.run(**options)

        monkeypatch.setattr(resolve, "resolve", answer)
        return seen

    return mean


def test_table(resolved: Any, capsys: pytest.CaptureFixture[str]):
    seen = resolved(tensor_model_parallel_size=2, sequence_parallel=True, global_batch_size=8)
    assert plan.command(["--model-name", "tiny", "--world", "4"]) == 0
    assert seen == [["--model-name", "tiny"]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["GiB", "per", "rank", "axes", "weights", "grads", "optim", "activ", "total"]
    assert lines[1].startswith("foundation    tp2 dp2 sp ")
    assert "parameters 452,160 (foundation, tiny), at most 226,752 on one rank" in lines
    assert "batch      8 x 128 = 1,024 tokens per step, 4 x 1 sequence(s) per rank" in lines
    assert "pipeline   bubble 0.0% of the working time" in lines
    assert max(map(len, lines)) <= 120


def test_json(resolved: Any, capsys: pytest.CaptureFixture[str]):
    resolved()
    assert plan.command(["--json", "--world", "2", "--device-memory", "80"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["world"] == 2
    assert data["components"][0]["parameters"] == 452096
    assert data["device_bytes"] == 80 * 2**30
    assert data["traffic"]["total"] == data["traffic"]["data"] > 0
    assert data["flops_per_step_and_rank"] * 2 == data["flops_per_step"]


def test_world_comes_from_the_launch_section_or_is_one(resolved: Any, capsys: pytest.CaptureFixture[str]):
    resolved()
    plan.command(["--json"])
    assert json.loads(capsys.readouterr().out)["world"] == 1


def test_what_does_not_fit_is_refused_after_the_table(resolved: Any, capsys: pytest.CaptureFixture[str]):
    resolved()
    with pytest.raises(PlanError, match=r"needs about 0.0 GiB, the device has 0.001: use more tensor or pipeline"):
        plan.command(["--device-memory", "0.001"])
    assert "of 0.001 GiB on the fullest rank" in capsys.readouterr().out


def test_an_illegal_layout_is_refused(resolved: Any):
    resolved(tensor_model_parallel_size=4)
    with pytest.raises(PlanError, match="world=6 is not a multiple"):
        plan.command(["--world", "6"])


def test_a_wrong_world_is_a_usage_error(resolved: Any, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ConfigError, match="--world must be a whole number of at least 1, got 'many'"):
        plan.command(["--world", "many"])
    with pytest.raises(ConfigError, match="--device-memory must be a positive number of GiB, got '-1'"):
        plan.command(["--device-memory", "-1"])


def test_dry_run_of_train_is_the_plan(resolved: Any, capsys: pytest.CaptureFixture[str]):
    seen = resolved()
    assert train.command(["--lr", "1e-4", "--dry-run"]) == 0
    assert seen == [["--lr", "1e-4"]]
    assert "parameters 452,096" in capsys.readouterr().out


def test_train_checks_the_plan_before_it_launches(resolved: Any):
    resolved(sequence_parallel=True)
    with pytest.raises(PlanError, match=r"parallel.sequence_parallel=True needs"):
        train.command([])


def test_train_asks_for_data_before_it_launches(resolved: Any):
    resolved()
    with pytest.raises(DataError, match="no data: give --data-path FILE"):
        train.command([])


@pytest.mark.parametrize(("command", "says"), [(plan, "--device-memory"), (train, "--tensor-model-parallel-size")])
def test_help(command: Any, says: str, capsys: pytest.CaptureFixture[str]):
    with contextlib.suppress(SystemExit):  # argparse leaves this way
        command.command(["--help"])
    out = capsys.readouterr().out
    assert says in out
    assert "examples" in out


NO_TORCH = """
import sys
import plan_tiny
from loongforge.core.cli import plan, train
from loongforge.core.config import resolve
from loongforge.core.errors import DataError
resolve.resolve = lambda argv: plan_tiny.run()
plan.command(["--world", "2"])
train.command(["--dry-run"])
try:
    train.command([])
except DataError:
    pass
print(sorted({"torch", "megatron", "transformers"} & set(sys.modules)))
"""


def test_no_torch_is_imported():
    environment = {"PYTHONPATH": str(Path(__file__).parent), "LOONGFORGE_PLATFORM": "cpu", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
