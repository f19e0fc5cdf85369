"""`loongforge new-model` writes a package that is installable, conforms as it is, and is short enough to read."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from loongforge.core import plugins
from loongforge.core.cli.shell import main
from loongforge.core.config.resolve import resolve
from loongforge.core.testing import check_family


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Put the package of a project folder on the path, with the metadata that an installer writes."""

    def install(folder: Path) -> None:
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        site = tmp_path / "site"
        shutil.copytree(folder / "src", site)
        info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        requires = [f"Requires-Dist: {one}" for one in project["dependencies"]]
        lines = ["Metadata-Version: 2.4", f"Name: {project['name']}", f"Version: {project['version']}", *requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        entries = project["entry-points"]["loongforge.models"]
        rows = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[loongforge.models]", *rows]))
        monkeypatch.syspath_prepend(str(site))

    return install


def lines_of(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("src/*/*.py"))


@pytest.mark.parametrize(("name", "like"), [("acme_dense", "qwen3"), ("acme_sparse", "deepseek3")])
def test_a_model_conforms_as_it_is(name: str, like: str, tmp_path: Path, installed: Callable[[Path], None]) -> None:
    folder = tmp_path / "acme-new"
    assert main(["new-model", name, "--like", like, "--output", str(folder)]) == 0
    if like == "qwen3":
        assert lines_of(folder) <= 150
    compile((folder / "tests/test_conforms.py").read_text(), "test_conforms.py", "exec")
    installed(folder)
    assert plugins.pick("models", name).state() == "ready"
    assert plugins.pick("models", name).missing() == []
    report = check_family(name, directory=tmp_path / "kit")
    assert report.skipped == ()
    assert report.owner.startswith(f"{name.replace('_', '-')} 0.1.0")


def language_models() -> list[str]:
    roles = {name: plugins.load("models", name).role for name in plugins.registered("models")}
    return sorted(name for name, role in roles.items() if role == "foundation" and not name.startswith("acme"))


@pytest.mark.parametrize("like", [name for name in language_models() if name != "qwen3"])
def test_others_are_whole_too(like: str, tmp_path: Path, installed: Callable[[Path], None]) -> None:
    folder, name = tmp_path / "acme-other", f"acme_as_{like}"  # no other test imports such a module
    main(["new-model", name, "--like", like, "--output", str(folder)])
    if like in ("llama", "qwen2"):
        assert lines_of(folder) <= 150
    installed(folder)
    spec = plugins.load("models", name)
    (size,) = spec.sizes
    ours = resolve(["--model-name", size, "--train-iters", "1"], note=lambda _: None).model.foundation
    theirs = plugins.load("models", like)
    assert ours.family == name
    assert type(ours.geometry) is spec.config()
    assert type(ours.geometry) is not theirs.config()
    assert name == ours.geometry.LABEL
    again = theirs.config().from_hf(ours.geometry.to_hf())
    assert again.geometry() == ours.geometry.geometry()
    assert spec.weights()(ours.geometry) == theirs.weights()(again)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["qwen3", "--like", "qwen3_moe"], "'qwen3' is a model of loongforge-models"),
        (["json", "--like", "qwen3"], "a package 'json' is installed already"),
        (["Acme-New", "--like", "qwen3"], "'Acme-New' is no package name"),
        (["acme_new", "--like", "qwen33"], "Did you mean"),
        (["acme_new", "--like", "qwen3_vit"], "an image_encoder, but only language models"),
        (["acme_new"], "--like"),
    ],
)
def test_mistakes_write_nothing(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-model", *words]) in (2, 6)  # a mistake of the command line, or of a plugin
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["new-model", "acme_new", "--like", "qwen3", "--output", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
