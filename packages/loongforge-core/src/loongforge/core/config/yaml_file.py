"""Read a YAML file strictly: syntax errors and doubled keys say file and line, dashes in keys become underscores."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any, cast

import yaml

from loongforge.core.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that refuses a key written twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build one mapping; `yaml.MarkedYAMLError` when a key comes twice, dashes and underscores alike."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = cast(Any, self.construct_object(key_node, deep=True))  # pyright: ignore[reportUnknownMemberType]
            name = underscored(key)
            if not isinstance(name, Hashable):
                continue  # the base class says what is wrong with it
            if name in seen:
                raise yaml.MarkedYAMLError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep=deep)


_Loader.add_constructor(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:timestamp",
    lambda loader, node: cast(str, node.value),  # a date is a text here
)


def read(path: Path) -> dict[str, Any]:
    """Contents of a YAML file that holds a mapping; `ConfigError` says file and line of what is wrong."""
    try:
        content: Any = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(complaint(path, error)) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold sections (`train:`, `model:`, ...), got {type(content).__name__}.")
    return _normal(None, content)


def complaint(path: Path | str, error: yaml.YAMLError) -> str:
    """One line about a YAML error, with file, line and column where PyYAML knows them."""
    mark = getattr(error, "problem_mark", None)
    place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
    return f"{path}{place}: not valid YAML: {getattr(error, 'problem', None) or error}."


def underscored(key: Any) -> Any:
    """A key as text, with underscores for dashes; one that cannot be a key stays as it is."""
    return str(key).replace("-", "_") if isinstance(key, Hashable) else key


def literal(value: Any) -> Any:
    """A value whose `${` stands for itself when OmegaConf reads it."""
    if isinstance(value, str):
        return value.replace("${", r"\${")
    if isinstance(value, list | tuple):
        return [literal(one) for one in cast(list[Any], value)]
    if isinstance(value, dict):
        return {name: literal(one) for name, one in cast(dict[Any, Any], value).items()}
    return value


def _normal(key: Any, value: Any) -> Any:
    """Underscore keys below `value`; a `defaults` list names files and stays as it is."""
    if key == "defaults":
        return value
    if isinstance(value, dict):
        return {underscored(name): _normal(name, inner) for name, inner in cast(dict[Any, Any], value).items()}
    if isinstance(value, list):
        return [_normal(None, inner) for inner in cast(list[Any], value)]
    return value
