"""What doctor finds, and that it finds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import loongforge.core
from loongforge.core import plugins
from loongforge.core.cli import examination, main


def examined(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, object]]:
    code = main(["doctor", "--json", *argv])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOONGFORGE_PLATFORM", "cpu")


def test_a_sound_machine_is_usable(capsys: pytest.CaptureFixture[str]) -> None:
    code, report = examined(capsys, "--quick")
    assert (code, report["usable"], report["problems"]) == (0, True, [])
    assert report["platform"]["chosen"] == "cpu"
    assert report["platform"]["why"].startswith("LOONGFORGE_PLATFORM")
    assert report["environment"]["LOONGFORGE_PLATFORM"] == "cpu"
    assert report["libraries"]["megatron-core"].startswith("0.19.")
    assert "torch" not in report
    assert set(report["plugins"]) == set(plugins.KINDS)


def test_without_quick_torch_speaks(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    code, report = examined(capsys)
    assert code == 0
    assert report["torch"]["version"] == torch.__version__


def test_the_text_ends_in_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "machine:"
    assert lines[-1] == "usable"


def test_an_unavailable_platform_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOONGFORGE_PLATFORM", "abacus")
    code, report = examined(capsys, "--quick")
    assert code == 1
    assert any("no platform 'abacus'" in one for one in report["problems"])
    assert report["platform"]["chosen"] == "none"


def test_a_requirement_that_is_not_met_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = plugins.met
    monkeypatch.setattr(plugins, "met", lambda line: not line.startswith("megatron-core") and real(line))
    code, report = examined(capsys, "--quick")
    assert code == 1
    assert any(one.startswith("loongforge-core needs megatron-core") for one in report["problems"])


def test_wheels_of_different_versions_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = examination.version
    monkeypatch.setattr(examination, "version", lambda name: "9.9" if name == "loongforge-models" else real(name))
    code, report = examined(capsys, "--quick")
    assert code == 1
    assert any("loongforge wheels of different versions: " in one for one in report["problems"])


def test_a_chosen_device_that_torch_does_not_see_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    choice = examination.Choice(name="cuda", reason="test", spec=plugins.load("platforms", "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    report = examination.Report()
    assert examination._torch(choice, report)["accelerators"] == []
    assert report.problems[0].startswith("platform 'cuda' was chosen (test), but torch ")


def test_accelerators_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    choice = examination.Choice(name="cuda", reason="test", spec=plugins.load("platforms", "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    report = examination.Report()
    assert examination._torch(choice, report)["accelerators"] == ["GPU 0", "GPU 1"]
    assert report.problems == []


def test_absent_compilers_are_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(examination.shutil, "which", lambda tool: None)
    code, report = examined(capsys, "--quick")
    assert code == 0
    assert "ninja and g++ not on PATH: extensions that torch compiles" in report["warnings"][-1]


def test_regular_packages_on_a_path(tmp_path: Path) -> None:
    (tmp_path / "a" / "loongforge" / "core").mkdir(parents=True)
    (tmp_path / "b" / "loongforge").mkdir(parents=True)
    (tmp_path / "b" / "loongforge" / "__init__.py").touch()
    assert examination.regular_packages([str(tmp_path / name) for name in "abb"]) == [tmp_path / "b"]


def test_a_regular_package_that_hides_the_wheels_is_a_problem(tmp_path: Path) -> None:
    """As when a distribution called loongforge is installed beside ours: doctor itself still starts, others may not."""
    shadow = tmp_path / "loongforge"
    shadow.mkdir()
    (shadow / "__init__.py").touch()
    (shadow / "core").symlink_to(Path(loongforge.core.__path__[0]))
    code = "import sys; from loongforge.core.cli import main; sys.exit(main(['doctor', '--quick', '--json']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "LOONGFORGE_PLATFORM": "cpu"},
    )
    assert done.returncode == 1, done.stderr
    assert f"{shadow / '__init__.py'} makes loongforge a regular package" in " ".join(
        json.loads(done.stdout)["problems"]
    )
