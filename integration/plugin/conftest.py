"""The third-party distributions `acme-llama` and `acme-vision`, installed, or put on the path as an installer does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ACME = Path(__file__).parent / "acme"
VISION = Path(__file__).parent / "acme_vision"
collect_ignore = ["acme"]  # its own tests run where it is installed
Shell = Callable[..., str]


@pytest.fixture(scope="session")
def site_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`site_of("acme_vision")`: a wheel of this folder as an installer leaves it."""

    def install(name: str) -> Path:
        site = tmp_path_factory.mktemp(name)
        shutil.copytree(Path(__file__).parent / name / "src", site, dirs_exist_ok=True)
        project = tomllib.loads((Path(__file__).parent / name / "pyproject.toml").read_text())["project"]
        info = site / f"{name}-{project['version']}.dist-info"
        info.mkdir()
        told = f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(told)
        lines = [
            line
            for group, entries in project["entry-points"].items()
            for line in (f"[{group}]", *(f"{key} = {target}" for key, target in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        return site

    return install


@pytest.fixture(scope="session")
def shell_at() -> Callable[[Path], Shell]:
    """`shell_at(site)(*words, cwd=..., code=0)`: output of `loongforge` where the wheel of `site` is installed."""

    def at(site: Path) -> Shell:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}

        def run(*words: str | Path, cwd: Path, code: int = 0) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "loongforge.core", *map(str, words)],
                cwd=cwd,
                env={**kept, "PYTHONPATH": str(site), "LOONGFORGE_PLATFORM": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}"
            return done.stdout

        return run

    return at


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`acme(path, old, new)` installs acme-llama with one text of one of its files replaced."""

    def install(path: str, old: str, new: str) -> None:
        site = tmp_path / "site"
        shutil.copytree(ACME / "src", site)
        text = (site / "acme_llama" / path).read_text()
        assert text.count(old) == 1, f"{path} holds {old!r} {text.count(old)} times"
        (site / "acme_llama" / path).write_text(text.replace(old, new))
        project = tomllib.loads((ACME / "pyproject.toml").read_text())["project"]
        info = site / "acme_llama-0.3.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {project['name']}\nVersion: 0.3.0\n")
        entries = project["entry-points"]["loongforge.models"]
        lines = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[loongforge.models]", *lines]))
        monkeypatch.syspath_prepend(str(site))

    return install


def uv(*words: str | Path, **variables: str) -> str:
    """Run uv in the workspace; from its cache where that suffices, from the registry otherwise."""
    base = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    for offline in ({"UV_OFFLINE": "1"}, {}):
        done = subprocess.run(
            ["uv", *map(str, words)], cwd=ROOT, env={**base, **offline, **variables}, capture_output=True, text=True
        )
        if done.returncode == 0:
            return done.stdout
    raise AssertionError(f"uv {' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserEnvironment:
    """A virtual environment with the locked libraries and our wheels, away from every source tree."""

    folder: Path
    acme_wheel: Path
    vision_wheel: Path

    def run(self, *words: str | Path, code: int = 0) -> str:
        """Standard output of a program of the environment; fails when it exits with another code."""
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "LANG")}
        program, *rest = map(str, words)
        done = subprocess.run(
            [str(self.folder / "bin" / program), *rest],
            cwd=self.folder,
            env={**kept, "LOONGFORGE_PLATFORM": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, f"{words}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout if code == 0 else done.stderr

    def install_acme(self) -> None:
        """Install the third party's wheels."""
        wheels = (self.acme_wheel, self.vision_wheel)
        uv("pip", "install", "--no-deps", "--python", self.folder / "bin" / "python", *wheels)
        uv("pip", "check", "--python", self.folder / "bin" / "python")

    def remove_acme(self) -> None:
        """Remove it."""
        uv("pip", "uninstall", "--python", self.folder / "bin" / "python", "acme-llama")


@pytest.fixture(scope="session")
def user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UserEnvironment]:
    """What a user has after `pip install 'loongforge-core[quickstart]' acme-llama`; removed afterwards, it is large."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(ACME, folder / "acme")
    uv("build", "--all-packages", "--no-sources", "--wheel", "--out-dir", folder / "dist")
    shutil.copytree(VISION, folder / "acme_vision")
    for name in ("acme", "acme_vision"):
        uv("build", "--wheel", "--out-dir", folder / "acme-dist", folder / name)
    venv = folder / "venv"
    uv("venv", "--python", sys.executable, venv)
    uv("sync", "--frozen", "--no-dev", "--no-install-workspace", UV_PROJECT_ENVIRONMENT=str(venv))
    uv("pip", "install", "--no-deps", "--python", venv / "bin" / "python", *(folder / "dist").glob("*.whl"))
    acme_wheel, vision_wheel = sorted((folder / "acme-dist").glob("*.whl"))
    made = UserEnvironment(folder=venv, acme_wheel=acme_wheel, vision_wheel=vision_wheel)
    made.install_acme()
    yield made
    shutil.rmtree(venv)
