"""The registration, the sizes and the configuration: everything that is known before a model is built."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from loongforge.core.config.families import configs
from loongforge.core.config.resolve import resolve
from loongforge.core.model.geometry import TransformerGeometry
from loongforge.core.plugins import Plugin

HEAVY = ("torch", "megatron", "transformers", "numpy")
"""What a spec must not import: listing all families costs nothing."""

_IMPORTED = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[2])
importlib.import_module(sys.argv[1])
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def is_plain(plugin: Plugin) -> str:
    """The spec loads, has this plugin API, imports nothing heavy, and what its extra promises is installed."""
    spec = plugin.spec
    if lacking := plugin.missing():
        raise AssertionError(f"needs {', '.join(lacking)}: {plugin.install_line()}")
    module = plugin.entry.module
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTED, module, json.dumps(sys.path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{module} cannot be imported alone: {done.stderr.strip().splitlines()[-1]}"
    heavy = set(HEAVY) & set(json.loads(done.stdout.splitlines()[-1]))
    assert not heavy, f"{module} imports {', '.join(sorted(heavy))}; a spec imports loongforge.core.plugins alone"
    return f"{module} is plain data, plugin API {spec.api[0]}.{spec.api[1]}"


def sizes_resolve(plugin: Plugin) -> str:
    """Every listed size has a YAML file that gives a configuration of the family, and no file is left unlisted."""
    spec = plugin.spec
    files = configs(f"{plugin.distribution}:{plugin.name}")
    assert spec.sizes, "sizes is empty: a family ships at least one configuration"
    if lacking := [size for size in spec.sizes if size not in files]:
        raise AssertionError(f"no {spec.configs}/{lacking[0]}.yaml for the listed size {lacking[0]!r}")
    if unlisted := [name for name in files if name not in spec.sizes]:
        raise AssertionError(f"{spec.configs}/{unlisted[0]}.yaml is not in sizes: --model-name cannot find it")
    for size, config in configurations(plugin):
        assert isinstance(config, spec.config()), f"{size}.yaml gives a {type(config).__name__}"
    return f"{len(spec.sizes)} ({', '.join(spec.sizes)})"


def config_round_trips(plugin: Plugin) -> str:
    """The config is a frozen dataclass, gives a geometry, and survives the way to `config.json` and back."""
    kind: Any = plugin.spec.config()
    name = plugin.spec.config.target
    assert is_dataclass(kind), f"{name} is not a dataclass"
    parameters: Any = vars(kind)["__dataclass_params__"]
    assert parameters.frozen, f"{name} is not frozen: write @dataclass(frozen=True, slots=True, kw_only=True)"
    for size, config in configurations(plugin):
        survives_hf(size, config, plugin.spec.hf_architectures)
        geometry = config.geometry()
        assert isinstance(geometry, TransformerGeometry), f"{size}: geometry() gives a {type(geometry).__name__}"
    return f"{name} is frozen, from_hf(to_hf(config)) == config for every size"


def survives_hf(label: str, config: Any, architectures: tuple[str, ...]) -> None:
    """`AssertionError` naming the fields that `to_hf` and `from_hf` do not bring back.

    Fields that the config's class lists in `TRAINING` say how the model trains, and a `config.json` does not.
    """
    training: tuple[str, ...] = getattr(config, "TRAINING", ())
    written = json.loads(json.dumps(config.to_hf()))
    back = type(config).from_hf(written)
    names = [field.name for field in fields(config) if field.name not in training]
    lost = [name for name in names if getattr(back, name) != getattr(config, name)]
    if lost:
        was, now = getattr(config, lost[0]), getattr(back, lost[0])
        raise AssertionError(f"{label}: from_hf(to_hf(config)) changes {', '.join(lost)} ({was!r} becomes {now!r})")
    claimed = written.get("architectures") or ["(none)"]
    assert set(claimed) <= set(architectures), (
        f"{label}: to_hf() writes architectures {claimed}, which hf_architectures {architectures} does not list"
    )


def configurations(plugin: Plugin) -> Iterator[tuple[str, Any]]:
    """Every listed size with its configuration, as a run would have it."""
    for size in plugin.spec.sizes:
        run = resolve(["--model-name", f"{plugin.distribution}:{size}", "--train-iters", "1"], note=lambda _: None)
        yield size, run.model.foundation.geometry
