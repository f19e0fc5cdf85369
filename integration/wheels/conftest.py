"""Build the six wheels once, and keep one clean environment that is filled anew for each of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ("kernels", "core", "models", "data", "ckpt", "xpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """One distribution as it would be published."""

    short: str
    """`core` for loongforge-core."""
    wheel: Path
    sdist: Path

    @property
    def files(self) -> set[str]:
        """Paths inside the wheel."""
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    @property
    def sdist_files(self) -> set[str]:
        """Paths inside the sdist, without its top folder."""
        with tarfile.open(self.sdist) as archive:
            return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}

    @property
    def code(self) -> set[str]:
        """Paths inside the wheel that are not its metadata."""
        return {path for path in self.files if ".dist-info/" not in path}

    @property
    def metadata(self) -> Message:
        """The core metadata of the wheel."""
        with zipfile.ZipFile(self.wheel) as archive:
            path = next(path for path in archive.namelist() if path.endswith(".dist-info/METADATA"))
            return HeaderParser().parsestr(archive.read(path).decode())

    @property
    def siblings(self) -> set[str]:
        """Short names of our own wheels that it requires without any extra."""
        required = [Requirement(line) for line in self.metadata.get_all("Requires-Dist", [])]
        return {one.name.removeprefix("loongforge-") for one in required if not one.marker} & set(WHEELS)


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


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Built]:
    """The six distributions by short name."""
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--all-packages", "--no-sources", "--out-dir", folder)
    made = {path.name for path in folder.glob("*.whl")} | {path.name for path in folder.glob("*.tar.gz")}
    assert len(made) == 2 * len(WHEELS), f"six wheels and six sdists are expected, got {sorted(made)}"
    found: dict[str, Built] = {}
    for short in WHEELS:
        (wheel,) = folder.glob(f"loongforge_{short}-*.whl")
        (sdist,) = folder.glob(f"loongforge_{short}-*.tar.gz")
        found[short] = Built(short=short, wheel=wheel, sdist=sdist)
    return found


@pytest.fixture
def data_without_compiler(tmp_path: Path) -> Path:
    """The wheel of loongforge-data as it is where there is no C++ compiler."""
    uv("build", "--package", "loongforge-data", "--wheel", "--no-sources", "--out-dir", tmp_path, CXX="")
    (wheel,) = tmp_path.glob("*.whl")
    return wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanEnvironment:
    """A virtual environment outside the workspace."""

    folder: Path
    built: dict[str, Built]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def install_alone(self, short: str) -> set[str]:
        """Leave one wheel, the wheels of ours it requires and the locked libraries of its closure, and nothing else.

        `uv pip check` then holds what lies there against the wheels' own metadata. Returns the wheels of ours.
        """
        options = ("--frozen", "--no-dev", "--no-install-workspace", "--package", f"loongforge-{short}")
        uv("sync", *options, UV_PROJECT_ENVIRONMENT=str(self.folder))
        wanted, new = {short}, {short}
        while new:
            new = set().union(*(self.built[one].siblings for one in new)) - wanted
            wanted |= new
        uv("pip", "install", "--no-deps", "--python", self.python, *(self.built[one].wheel for one in sorted(wanted)))
        uv("pip", "check", "--python", self.python)
        return wanted

    def install_extra(self, short: str, extra: str) -> None:
        """Leave `loongforge-<short>[extra]` with all it asks for, and nothing else."""
        options = ("--frozen", "--no-dev", "--no-install-workspace", "--package", f"loongforge-{short}")
        uv("sync", *options, "--extra", extra, UV_PROJECT_ENVIRONMENT=str(self.folder))
        wheels = [self.built[one].wheel for one in sorted(self._behind(short, extra))]
        uv("pip", "install", "--no-deps", "--python", self.python, *wheels)
        uv("pip", "check", "--python", self.python)

    def _behind(self, short: str, extra: str) -> set[str]:
        """Our own wheels behind a wheel with an extra."""
        found: set[tuple[str, str]] = set()
        new = {(short, extra)}
        while new:
            found |= new
            asked = {
                (one.name.removeprefix("loongforge-"), more)
                for name, wanted in new
                for one in map(Requirement, self.built[name].metadata.get_all("Requires-Dist", []))
                if one.name.startswith("loongforge-") and (not one.marker or one.marker.evaluate({"extra": wanted}))
                for more in one.extras or {""}
            }
            new = asked - found
        return {name for name, _ in found}

    def run(self, code: str, *argv: str) -> str:
        """Standard output of `code`, run by the environment's interpreter away from the workspace."""
        kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "TMPDIR", "LANG")}
        done = subprocess.run(
            [str(self.python), "-c", code, *argv],
            cwd=self.folder,
            env={**kept, "LOONGFORGE_PLATFORM": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def clean(built: dict[str, Built], tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanEnvironment]:
    """An empty environment of the same Python; removed afterwards, for it may hold gigabytes."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    uv("venv", "--python", sys.executable, folder)
    yield CleanEnvironment(folder=folder, built=built)
    shutil.rmtree(folder)
