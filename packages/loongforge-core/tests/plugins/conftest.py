"""Make real distributions in a temporary folder: metadata, entry points and modules, as an installed wheel has them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

Wheel = Callable[..., Path]

FAMILY = """\
from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="{name}", api={api}, modality="text", sizes=("tiny",), configs="configs", config=Lazy("{module}.model:Config"),
    build=Lazy("{module}.model:build"), weights=Lazy("{module}.model:weights"), extra={extra}, summary="A family.",
)
"""


def family(module: str, *, name: str = "acme", api: object = (1, 0), extra: str | None = None) -> dict[str, str]:
    """Modules of a package whose spec registers one model family."""
    spec = FAMILY.format(module=module, name=name, api=api, extra=repr(extra))
    return {f"{module}/__init__.py": "", f"{module}/spec.py": spec}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wheel]:
    """`wheel(name, entries={group: {name: target}}, files={path: text})` installs one and returns its folder."""
    before = set(sys.modules)

    def install(
        name: str,
        *,
        entries: Mapping[str, Mapping[str, str]],
        files: Mapping[str, str],
        version: str = "0.1.0",
        metadata: str = "",
    ) -> Path:
        site = tmp_path / name
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n{metadata}")
        lines: list[str] = []
        for kind, names in entries.items():
            lines += [f"[loongforge.{kind}]", *(f"{entry} = {target}" for entry, target in names.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for path, text in files.items():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            (site / path).write_text(text)
        monkeypatch.syspath_prepend(str(site))
        return site

    monkeypatch.delenv("LOONGFORGE_PLUGINS", raising=False)
    yield install
    for module in set(sys.modules) - before:
        if module.partition(".")[0].startswith("acme"):
            del sys.modules[module]


@pytest.fixture
def acme(wheel: Wheel) -> Wheel:
    """`acme(name, module, **family)` installs a distribution that registers the model family `acme`."""

    def install(distribution: str, module: str, metadata: str = "", **spec: object) -> Path:
        entry = {"models": {"acme": f"{module}.spec:FAMILY"}}
        return wheel(distribution, entries=entry, files=family(module, **spec), metadata=metadata)  # type: ignore[arg-type]

    return install
