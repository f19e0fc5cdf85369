"""The watch as a run uses it: metrics, lines, notes, trackers, profile, hints."""

from __future__ import annotations

import gzip
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from loongforge.core import plugins
from loongforge.core.config.run import ComponentConfig, ModelConfig, RunConfig, WatchConfig
from loongforge.core.errors import CheckpointError, ConfigError, PluginError
from loongforge.core.quickstart.curve import draw_curves
from loongforge.core.watch import StepReport, Watch, read_metrics, trackers
from loongforge.core.watch.metrics import MetricsFile
from loongforge.core.watch.progress import BARS, line, sparkline


def config(**watch) -> RunConfig:
    return RunConfig(
        model=ModelConfig(foundation=ComponentConfig(family="qwen3", geometry=None)), watch=WatchConfig(**watch)
    )


def report(step: int, **changes) -> StepReport:
    base = StepReport(
        step=step,
        loss=1 / 3 + 1 / step,
        grad_norm=0.1 + 0.2,
        lr=1e-4,
        tokens=2048,
        loss_tokens=2000,
        consumed_samples=8 * step,
        seconds=0.5,
        data_wait_seconds=0.01,
        tokens_per_second=4096.0,
        peak_memory_bytes=3 * 2**30,
    )
    return replace(base, **changes)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(directory: Path | None, steps: range, stream: io.StringIO | None = None, **watch) -> str:
    stream = stream or io.StringIO()
    with Watch(config(**watch), directory, True, 10, steps.start - 1, stream) as watching:
        for step in steps:
            watching.step(report(step))
    return stream.getvalue()


def test_metrics_have_every_step_with_all_digits(tmp_path):
    run(tmp_path, range(1, 4), log_interval=3)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["loss"] == 1 / 3 + 1 / 3
    assert rows[0]["grad_norm"] == 0.30000000000000004
    assert {"lr", "tokens", "loss_tokens", "seconds", "tokens_per_second", "consumed_samples"} <= rows[0].keys()


def test_each_line_is_there_at_once(tmp_path):
    metrics = MetricsFile(tmp_path, 0)
    metrics.write(report(1))
    assert len(read_metrics(metrics.path)) == 1
    metrics.close()


def test_resume_cuts_later_steps_and_a_torn_line(tmp_path):
    run(tmp_path, range(1, 6))
    path = tmp_path / "metrics.jsonl"
    untouched = path.read_text().split("\n")[:3]
    path.write_text(path.read_text() + '{"step": 6, "lo')
    said = run(tmp_path, range(4, 8))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6, 7]
    assert path.read_text().split("\n")[:3] == untouched
    assert f"{path}: cut 3 lines after step 3." in said


def test_a_torn_line_alone_is_cut(tmp_path):
    run(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    assert len(read_metrics(path)) == 2
    run(tmp_path, range(3, 5))
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_a_foreign_file_is_not_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("not json\n[1]\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:1 is not an object with a step: 'not json'"):
        run(tmp_path, range(1, 2))
    assert path.read_text() == "not json\n[1]\n"


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*Give a writable --save"):
        run(tmp_path / "file", range(1, 2))


def test_not_finite_is_null(tmp_path):
    metrics = MetricsFile(tmp_path, 0)
    metrics.write(report(1, grad_norm=math.inf))
    metrics.close()
    (row,) = (json.loads(text) for text in metrics.path.read_text().splitlines())
    assert row["grad_norm"] is None


def test_detail_is_recorded_and_not_shown(tmp_path: Path):
    told = report(1, detail={"expert_load/max/layer_3": 1.5})
    assert "expert_load" not in line(told, 10, 1.0)
    assert trackers.numbers(told)["expert_load/max/layer_3"] == 1.5
    metrics = MetricsFile(tmp_path, 0)
    metrics.write(told)
    metrics.close()
    assert read_metrics(metrics.path)[0]["expert_load/max/layer_3"] == 1.5


def test_extra_stands_beside_and_never_over_the_numbers():
    assert report(1, extra={"held_out_loss": 2.0}).values()["held_out_loss"] == 2.0
    with pytest.raises(AssertionError, match="extra repeats"):
        report(1, extra={"loss": 2.0}).values()


def test_no_directory_is_said_once():
    said = run(None, range(1, 3))
    assert said.count("No metrics.jsonl is written: no --save was given.") == 1


def test_the_line_of_a_step():
    text = line(report(4, extra={"held_out_loss": 1.5}, data_wait_seconds=0.05), 10, 2.0)
    assert text == (
        "step 4/10 | loss 0.5833 | grad norm 0.300 | lr 1.000e-04 | 4,096 tokens/s | 3.00 GiB | data wait 10% | "
        "ETA 0:00:12 | held_out_loss 1.5000"
    )


def test_lines_come_at_the_interval_and_at_the_end():
    said = run(None, range(1, 11), log_interval=4)
    assert [text.split()[1] for text in said.splitlines() if text.startswith("step")] == ["4/10", "8/10", "10/10"]


def test_a_terminal_gets_a_bar_and_the_same_lines():
    said = run(None, range(1, 11), Terminal(), log_interval=5)
    assert "step 5/10 | loss 0.5333" in said
    assert BARS[0] in said
    assert "\x1b[" in said
    assert "\x1b[" not in run(None, range(1, 11))


def test_sparkline():
    assert sparkline([1.0, 3.0, 2.0]) == BARS[0] + BARS[7] + BARS[4]
    assert sparkline([2.0, 2.0]) == BARS[0] * 2


def test_notes_are_said_once_and_on_the_main_rank_alone(tmp_path, capsys):
    stream = io.StringIO()
    with Watch(config(), tmp_path / "main", True, 1, 0, stream) as main:
        main.note("one")
        main.note("one")
    with Watch(config(), tmp_path / "other", False, 1, 0) as other:
        other.note("two")
        other.step(report(1))
    assert stream.getvalue() == "one\n"
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "other").exists()


def test_a_starving_loader_is_reported_once_after_twenty_steps():
    stream = io.StringIO()
    with Watch(config(log_interval=100), None, True, 60, 0, stream) as watch:
        for step in range(1, 20):
            watch.step(report(step, data_wait_seconds=0.2))
        assert "waiting for data" not in stream.getvalue()
        for step in range(20, 60):
            watch.step(report(step, data_wait_seconds=0.2))
    assert (
        stream.getvalue().count("40% of the last 20 steps went into waiting for data. Raise data.num_workers (now 2)")
        == 1
    )
    assert "waiting for data" not in run(None, range(1, 10))


def test_tensorboard_files_are_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, range(1, 4), trackers=("tensorboard",))
    run(None, range(1, 4), tensorboard_dir=str(tmp_path / "elsewhere"))
    for folder in (tmp_path / "tensorboard", tmp_path / "elsewhere"):
        events = EventAccumulator(str(folder))
        events.Reload()
        losses = events.Scalars("loss")
        assert [event.step for event in losses] == [1, 2, 3]
        assert losses[1].value == pytest.approx(1 / 3 + 1 / 2)


def test_tensorboard_needs_a_place():
    with pytest.raises(ConfigError, match="tensorboard needs --save or --tensorboard-dir"):
        run(None, range(1, 2), trackers=("tensorboard",))


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_a_tracker_that_is_not_installed(name, tmp_path):
    plugin = plugins.pick("trackers", name)
    if not plugin.missing():
        pytest.skip(f"{name} is installed")
    assert plugin.state() == f"needs pip install 'loongforge-core[{name}]'"
    with pytest.raises(PluginError, match=rf"pip install 'loongforge-core\[{name}\]'"):
        run(tmp_path, range(1, 2), trackers=(name,))


def test_an_unknown_tracker(tmp_path):
    with pytest.raises(PluginError, match="Did you mean 'tensorboard'"):
        run(tmp_path, range(1, 2), trackers=("tensorbord",))


class Recorder:
    """Stands for the two libraries: keeps the calls they would get."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def init(self, **named) -> Recorder:
        self.calls.append(("init", named))
        return self

    def log(self, values: dict, step: int) -> None:
        self.calls.append(("log", values["loss"], step))

    def finish(self) -> None:
        self.calls.append(("finish",))


@pytest.mark.parametrize("name", ["wandb", "swanlab"])
def test_the_calls_a_tracker_library_gets(name, tmp_path, monkeypatch):
    library = Recorder()
    monkeypatch.setitem(sys.modules, name, library)
    for _ in range(2):
        tracker = getattr(trackers, name)(config(), tmp_path)
        tracker.log(report(1))
        tracker.close()
    (first, named), *rest = library.calls
    assert first == "init"
    assert named["project"] == "loongforge"
    assert named["config"]["watch"]["log_interval"] == 1
    assert rest[:2] == [("log", 1 / 3 + 1, 1), ("finish",)]
    if name == "wandb":  # a resumed run goes on in the same curve
        assert named["id"] == library.calls[3][1]["id"]


def test_a_failing_tracker_does_not_stop_the_run(tmp_path, monkeypatch):
    class Failing:
        def log(self, report: StepReport) -> None:
            raise ConnectionError("server gone")

        def close(self) -> None:
            raise ConnectionError("still gone")

    spec = SimpleNamespace(make=lambda: lambda config, directory: Failing())
    monkeypatch.setattr(plugins, "load", lambda kind, name: spec)
    said = run(tmp_path, range(1, 4), trackers=("failing",))
    assert said.count("Tracker failing stopped at step 1: ConnectionError: server gone") == 1
    assert "Tracker failing did not finish: ConnectionError: still gone" in said
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_the_profile_holds_the_asked_steps(tmp_path):
    import torch

    with Watch(
        config(profile=True, profile_step_start=2, profile_step_end=4), tmp_path, True, 5, 0, io.StringIO()
    ) as watch:
        for step in range(1, 6):
            torch.ones(2).cumsum(0) if step in (2, 3) else torch.ones(2).logcumsumexp(0)
            watch.step(report(step))
    with gzip.open(tmp_path / "profile" / "rank0.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("aten::cumsum") == 2
    assert "aten::logcumsumexp" not in names


def test_a_profile_needs_a_place():
    with pytest.raises(ConfigError, match="give --save"):
        run(None, range(1, 2), profile=True)


def test_the_curve_is_a_picture(tmp_path):
    with Watch(config(), tmp_path, True, 3, 0, io.StringIO()) as watch:
        for step in range(1, 4):
            watch.step(report(step, extra={"valid_loss": 2.0} if step == 3 else {}))
    draw_curves({"training": tmp_path / "metrics.jsonl"}, 1.5, tmp_path / "loss.png")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (540, 600)
    assert pixels.std() > 0.05


def test_watching_imports_no_torch():
    def loaded(code: str) -> list[str]:
        script = f"{code}\nimport sys; print(' '.join(sys.modules))"
        return subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()

    assert "torch" not in loaded("from loongforge.core.watch import Watch, spec")
    assert "torch" in loaded("import torch")  # the check can fail


def test_choices_with_the_same_reasons_stand_in_one_line() -> None:
    from loongforge.core.watch.announce import kernel_lines

    dense = SimpleNamespace(geometry=SimpleNamespace(experts=None, delta=None))
    chosen = (
        "norm: fast refused (needs cuda); using plain",
        "loss: using fast",
        "rope: fast refused (needs cuda); using plain",
    )
    assert kernel_lines(dense, SimpleNamespace(layers=SimpleNamespace(ops=chosen))) == [  # pyright: ignore
        "Kernel norm, rope: fast refused (needs cuda); using plain.",
        "Kernel loss: using fast.",
    ]
