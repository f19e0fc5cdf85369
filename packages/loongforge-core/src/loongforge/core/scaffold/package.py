"""Write a package that registers a new language model: complete, installable, and able to prove itself."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from loongforge.core import plugins
from loongforge.core.errors import ConfigError
from loongforge.core.plugins import API, Plugin
from loongforge.core.scaffold.source import FamilySource

NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def scaffold(name: str, like: Plugin, folder: Path) -> list[Path]:
    """Make `folder` with the package `name`, which begins as a copy of the family `like`; the files written.

    Raises `ConfigError` when the name cannot be used or the folder holds something.
    """
    _check(name, folder)
    texts = files(name, FamilySource.of(like))
    for path, text in texts.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return [folder / path for path in texts]


def files(name: str, source: FamilySource) -> dict[str, str]:
    """Text by path within the folder."""
    size, yaml = source.smallest()
    own_size = f"{name}_{size.removeprefix(source.plugin.name).strip('_')}"
    header, body = f"# Begins as {size}.\n", "".join(_without_header(yaml))
    package = f"src/{name}"
    return {
        "pyproject.toml": _project(name, source),
        "README.md": _readme(name, own_size, source),
        f"{package}/__init__.py": f'"""{name} for LoongForge. Importing this does nothing; see spec.py."""\n',
        f"{package}/spec.py": _spec(name, own_size, source),
        f"{package}/configs/{own_size}.yaml": header + re.sub(r"(?m)^family: .*$", f"family: {name}", body),
        **{f"{package}/{file}": text for file, text in source.modules(name).items()},
        "tests/test_conforms.py": _test(name),
    }


def _check(name: str, folder: Path) -> None:
    if not NAME.fullmatch(name):
        raise ConfigError(f"new-model: {name!r} is no package name: use lower case, digits and _, as in acme_llama.")
    if rivals := plugins.registered("models").get(name):
        raise ConfigError(f"new-model: {name!r} is a model of {rivals[0].owner} already. Choose another name.")
    if find_spec(name) is not None:
        raise ConfigError(f"new-model: a package {name!r} is installed already. Choose another name.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"new-model: {folder} is not an empty folder. Choose another one with --output.")


def _without_header(yaml: str) -> list[str]:
    lines = yaml.splitlines(keepends=True)
    return lines[1:] if lines and lines[0].startswith("#") else lines


def _project(name: str, source: FamilySource) -> str:
    dashed, owner = name.replace("_", "-"), source.plugin.distribution
    ours = plugins.distribution("loongforge-core").version
    needed = [f"loongforge-core~={ours}"]
    if owner != "loongforge-core":
        needed.append(f"{owner}~={plugins.distribution(owner).version}")
    quoted = ", ".join(f'"{one}"' for one in needed)
    return f"""\
[build-system]
requires = ["hatchling>=1.26"]
build-backend = "hatchling.build"

[project]
name = "{dashed}"
version = "0.1.0"
description = "The {name} language model for LoongForge."
readme = "README.md"
requires-python = ">=3.12"
dependencies = [{quoted}]

[project.optional-dependencies]
test = ["loongforge-ckpt~={ours}", "pytest>=8", "transformers>=5"]

[project.entry-points."loongforge.models"]
{name} = "{name}.spec:FAMILY"

[tool.hatch.build.targets.wheel]
packages = ["src/{name}"]
"""


def _spec(name: str, size: str, source: FamilySource) -> str:
    architectures = ", ".join(f'"{one}"' for one in source.spec.hf_architectures)
    comma = "," if len(source.spec.hf_architectures) == 1 else ""
    return f"""\
\"\"\"Registration of the {name} family.\"\"\"

from loongforge.core.plugins import Lazy, ModelFamily

FAMILY = ModelFamily(
    name="{name}",
    api={API},
    modality="{source.spec.modality}",
    sizes=("{size}",),
    configs="configs",
    config=Lazy("{source.target("config", name)}"),
    build=Lazy("{source.target("build", name)}"),
    weights=Lazy("{source.target("weights", name)}"),
    hf_architectures=({architectures}{comma}),
    summary="The {name} language model.",
)
"""


def _readme(name: str, size: str, source: FamilySource) -> str:
    dashed, like = name.replace("_", "-"), source.plugin.name
    return f"""\
# {dashed}

The {name} language model for LoongForge. It begins as a copy of `{like}` and differs from it in nothing yet.

| File | What to say there |
|---|---|
| `src/{name}/config.py` | the shape of a model, and its translation to a Hugging Face `config.json` |
| `src/{name}/weights.py` | which Hugging Face tensor is which parameter |
| `src/{name}/model.py` | the model itself |
| `src/{name}/configs/*.yaml` | the sizes, one file each, named in `spec.py` |
| `src/{name}/spec.py` | what is registered: the architecture of your `config.json`, your sizes |

```
pip install -e '.[test]'
loongforge show models {name}
loongforge plan --model-name {size} --train-iters 1
pytest        # the conformance kit
```

While `hf_architectures` in `spec.py` is that of `{like}`, `--load HF_DIR` needs to be told whose model it is:
`model.foundation.family={dashed}:{name}`.
"""


def _test(name: str) -> str:
    return f"""\
from loongforge.core.testing import check_family


def test_{name}_conforms(tmp_path):
    print(check_family("{name}", directory=tmp_path))
"""
