"""The files of a registered family that a new package begins with, under the new package's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loongforge.core.errors import ConfigError
from loongforge.core.plugins import ModelFamily, Plugin

LEFT_OUT = ("__init__.py", "spec.py")
"""Files that the new package has in its own words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySource:
    """A family as text: what of it lies in its own folder and is copied, and what stays an import."""

    plugin: Plugin
    package: str
    """Dotted name of the folder: `loongforge.models.qwen3`."""
    folder: Path
    owns_config: bool
    """Whether the config class is defined in the folder; otherwise the new family shares it."""

    @classmethod
    def of(cls, plugin: Plugin) -> FamilySource:
        """Find the files; `ConfigError` for what is no foundation."""
        spec: ModelFamily = plugin.spec
        if spec.role != "foundation":
            raise ConfigError(f"--like {plugin.name}: an {spec.role}, but only language models can be scaffolded.")
        package = plugin.entry.value.partition(":")[0].rpartition(".")[0]
        config = spec.config.target.partition(":")[0]
        return cls(plugin=plugin, package=package, folder=plugin.folder(), owns_config=config.startswith(f"{package}."))

    @property
    def spec(self) -> ModelFamily:
        """The registration."""
        return self.plugin.spec

    def modules(self, name: str) -> dict[str, str]:
        """Python files of the new package `name` by file name."""
        texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(self.folder.glob("*.py"))}
        return {file: self._renamed(text, name) for file, text in texts.items() if file not in LEFT_OUT}

    def target(self, which: str, name: str) -> str:
        """`module:attribute` behind `config`, `build` or `weights` in the new package."""
        module, _, attribute = getattr(self.spec, which).target.partition(":")
        inside = module.startswith(f"{self.package}.")
        return f"{self._renamed(module, name) if inside else module}:{self._renamed(attribute, name)}"

    def smallest(self) -> tuple[str, str]:
        """Name and YAML of the size with the fewest parameters."""
        import yaml

        from loongforge.core.plan.parameters import count_parameters

        def parameters(size: str) -> int:
            values: Mapping[str, Any] = yaml.safe_load(self._yaml(size))
            geometry = self.spec.config()(**_fields(values)).geometry()
            return count_parameters(geometry, geometry.vocab_size)

        size = min(self.spec.sizes, key=parameters)
        return size, self._yaml(size)

    def _yaml(self, size: str) -> str:
        return (self.folder / self.spec.configs / f"{size}.yaml").read_text(encoding="utf-8")

    def _renamed(self, text: str, name: str) -> str:
        text = re.sub(rf"\b{re.escape(self.package)}(?=\.|\b)", name, text)
        if not self.owns_config:
            return text
        config = self.spec.config.target.rpartition(":")[2]
        text = re.sub(rf"\b{config}\b", f"{camel_case(name)}Config", text)
        return re.sub(r"^(    LABEL: ClassVar\[str\] = ).*$", rf'\1"{name}"', text, flags=re.MULTILINE)


def camel_case(name: str) -> str:
    """`my_model` to `MyModel`."""
    return "".join(part.capitalize() for part in name.split("_"))


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a geometry out of a YAML file: without what names the family, lists as tuples."""
    found = {key: value for key, value in values.items() if key not in ("family", "defaults")}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
