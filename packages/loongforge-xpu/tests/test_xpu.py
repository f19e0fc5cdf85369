"""Registration, probe and refusals. The device itself cannot be tested: its runtime is not public."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from loongforge.core import plugins
from loongforge.core.errors import PlatformError
from loongforge.core.platform import Platform, choose
from loongforge.xpu.platform import KunlunPlatform
from loongforge.xpu.probe import RUNTIME, kunlun
from loongforge.xpu.spec import PLATFORM


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable module of the runtime's name that does nothing."""
    folder = tmp_path / "vendor"
    folder.mkdir()
    (folder / f"{RUNTIME}.py").write_text("STARTED = True\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, RUNTIME, raising=False)
    yield folder
    sys.modules.pop(RUNTIME, None)


def devices(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "dev"
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def test_registered_under_its_name() -> None:
    plugin = plugins.pick("platforms", "kunlun")
    assert plugin.distribution == "loongforge-xpu"
    assert plugin.spec is PLATFORM
    assert plugin.state() == "ready"
    assert issubclass(PLATFORM.platform(), Platform)


@pytest.mark.parametrize("names", [(), ("xpuctrl",), ("nvidia0",)])
def test_probe_without_a_device_node(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = devices(tmp_path, *names)
    assert kunlun(folder) == (False, f"no {folder}/xpu* device")


def test_probe_without_the_runtime(tmp_path: Path) -> None:
    found = kunlun(devices(tmp_path, "xpu0", "xpu1", "xpuctrl"))
    assert found == (False, "2 device node(s), but the vendor's PyTorch (module torch_xmlir) is not installed")


def test_probe_finds_both_and_imports_nothing(tmp_path: Path, stand_in: Path) -> None:
    assert kunlun(devices(tmp_path, "xpu0")) == (True, "1 device node(s) and module torch_xmlir")
    assert RUNTIME not in sys.modules


def test_asking_for_an_absent_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOONGFORGE_PLATFORM", "kunlun")
    with pytest.raises(PlatformError) as refused:
        choose()
    assert "platform 'kunlun' (LOONGFORGE_PLATFORM) is not available here: no /dev/xpu* device." in str(refused.value)


def test_every_way_to_the_device_needs_the_runtime() -> None:
    platform = KunlunPlatform()
    for call in (platform.activate, platform.device_count, lambda: platform.device(0)):
        with pytest.raises(PlatformError) as refused:
            call()
        assert str(refused.value) == (
            "platform 'kunlun' needs the vendor's PyTorch: the module torch_xmlir cannot be imported "
            "(ModuleNotFoundError: No module named 'torch_xmlir'). Install the torch and torch_xmlir wheels that come "
            "with the Kunlun runtime, or set LOONGFORGE_PLATFORM=cpu."
        )


def test_a_runtime_without_its_library_is_named(stand_in: Path) -> None:
    (stand_in / f"{RUNTIME}.py").write_text("raise OSError('libxpurt.so: cannot open shared object file')\n")
    with pytest.raises(PlatformError, match=r"OSError: libxpurt\.so: cannot open"):
        KunlunPlatform().activate()


def test_a_worker_without_a_device_is_refused(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        PlatformError, match=r"worker 2 has no XPU, torch \S+ sees 2 on this node\. Start fewer workers"
    ):
        KunlunPlatform().device(2)


def test_a_worker_gets_the_device_of_its_number(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    platform = KunlunPlatform()
    assert platform.device(1) == torch.device("cuda", 1)
    assert current == [1]
    assert sys.modules[RUNTIME].STARTED


def test_spec_and_probe_import_nothing_heavy() -> None:
    code = (
        "import sys, loongforge.xpu.spec, loongforge.xpu.probe as p; p.kunlun();"
        "print(sorted({'torch', 'numpy', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
