"""Each wheel, installed alone in a clean environment, imports whole and registers what it promises."""

from __future__ import annotations

import json

import pytest

SHORTS = ("kernels", "core", "models", "data", "ckpt", "xpu")
IMPORT_ALL = """
import importlib, importlib.util, json, pkgutil, sys
short, *others = sys.argv[1:]
package = importlib.import_module("loongforge." + short)
assert package.__file__.startswith(sys.prefix), package.__file__
assert sys.modules["loongforge"].__file__ is None, "loongforge is a namespace"
for other in others:
    assert importlib.util.find_spec("loongforge." + other) is None, other + " is here too"
if short != "kernels":
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose
    start_megatron(choose().platform())
names = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(json.dumps(names))
"""
LIST = "import sys; from loongforge.core.cli import main; sys.exit(main(sys.argv[1:]))"
KERNELS = """
import json, sys
from loongforge.kernels.registry import Registry
registry = Registry.installed()
print(json.dumps([list(registry.ops), list(registry.broken), "megatron" in sys.modules]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("short", SHORTS)
def test_a_wheel_installs_and_imports_alone(clean, short: str) -> None:
    present = clean.install_alone(short)
    names = json.loads(
        clean.run(IMPORT_ALL, short, *(other for other in SHORTS if other not in present)).splitlines()[-1]
    )
    assert f"loongforge.{short}.spec" in names or len(names) > 1
    if short == "kernels":
        ops, broken, megatron = json.loads(clean.run(KERNELS))
        assert (bool(ops), broken, megatron) == (True, [], False)
        return
    listed = json.loads(clean.run(LIST, "list", "--json"))
    broken = [row for rows in listed.values() for row in rows if row["state"].startswith("broken")]
    assert broken == []
    owners = {row["owner"].split()[0] for rows in listed.values() for row in rows}
    assert owners == {f"loongforge-{one}" for one in present}
    assert json.loads(clean.run(LIST, "doctor", "--quick", "--json"))["problems"] == []
