"""A Hugging Face checkpoint directory as files and JSON. Imports no torch."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from loongforge.core.errors import CheckpointError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

TRAVEL = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "configuration_*.py",
    "cpp_kernels.py",
    "generation_config.json",
    "merges.txt",
    "modeling_*.py",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "qwen_generation_utils.py",
    "special_tokens_map.json",
    "tokenization_*.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""Files beside the weights that belong to the model and move with it unchanged, code for transformers' `auto_map` too;
patterns of `fnmatch`. Nothing here ever runs that code."""


def detect(path: str | Path) -> bool:
    """Whether the directory holds a Hugging Face model: a `config.json` that names a `model_type` or `architectures`.

    Weights are not looked for: a directory that lacks them is this format, and loading it says what is missing.
    """
    try:
        config = json.loads((Path(path) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("model_type") or config.get("architectures"))


def read_config(path: str | Path) -> dict[str, Any]:
    """Contents of `config.json`; `CheckpointError` when it is absent, unreadable or no JSON object."""
    file = Path(path) / CONFIG
    if not Path(path).is_dir():
        raise CheckpointError(absent(Path(path)))
    config = _read_object(file)
    if isinstance(config, str):
        raise CheckpointError(config)
    return config


def absent(path: Path) -> str:
    """Why `path` is no directory to read, and the remedy."""
    if path.exists():
        return f"{path}: not a directory. Give the directory that holds {CONFIG} and the safetensors files."
    old = replaced(path)
    if old.is_dir():
        return (
            f"{path}: no such directory. An export was interrupted as it took its place; rename {old} to {path.name}."
        )
    return f"{path}: no such directory."


def replaced(path: Path) -> Path:
    """Where an existing export waits for the moment in which its successor takes its name."""
    return path.with_name(f".{path.name}.replaced")


def incomplete(path: Path) -> Path:
    """Where an export is written until it is complete."""
    return path.with_name(f".{path.name}.incomplete")


def locate(path: Path) -> tuple[dict[str, str], list[str]]:
    """File name of every tensor that the index lists, or of the single file under the name `*`; and problems.

    A single `model.safetensors` goes before an index, as in transformers.
    """
    if not path.is_dir():
        return {}, [absent(path)]
    if (path / SINGLE).is_file():
        return {"*": SINGLE}, []
    if not (path / INDEX).is_file():
        return {}, [_no_weights(path)]
    index = _read_object(path / INDEX)
    if isinstance(index, str):
        return {}, [index]
    where = index.get("weight_map")
    if not isinstance(where, dict) or not where:
        return {}, [f"{path / INDEX}: no 'weight_map' with the file of every tensor. Download it again."]
    if strange := sorted({str(file) for file in where.values() if not _is_plain(file)}):
        return {}, [f"{path / INDEX}: {strange[0]!r} is not the name of a safetensors file in this directory."]
    lacking = sorted({file for file in where.values() if not (path / file).is_file()})
    return where, [f"{path / file}: named in {INDEX} but absent. Download it again." for file in lacking]


def foreign_entries(path: Path) -> list[str]:
    """Names in an existing directory that no export writes, so that replacing it would lose something."""
    own = (CONFIG, INDEX, "*.safetensors", *TRAVEL)
    return sorted(
        entry.name for entry in path.iterdir() if entry.is_dir() or not any(fnmatch(entry.name, one) for one in own)
    )


def travellers(path: Path) -> list[Path]:
    """Files of a directory that move with the model."""
    files = (entry for entry in path.iterdir() if any(fnmatch(entry.name, one) for one in TRAVEL))
    return sorted(entry for entry in files if entry.is_file())


def _is_plain(file: Any) -> bool:
    return isinstance(file, str) and file == Path(file).name and file.endswith(".safetensors")


def _no_weights(path: Path) -> str:
    pickled = sorted(entry.name for entry in path.iterdir() if any(fnmatch(entry.name, one) for one in PICKLED))
    if pickled:
        return (
            f"{path}: holds only pickled weights ({pickled[0]}), which can run code and are never read. Convert them "
            "once in a place you trust: transformers' from_pretrained(...) and save_pretrained(...) write safetensors."
        )
    return f"{path}: no weights: neither {SINGLE} nor {INDEX}."


def _read_object(file: Path) -> dict[str, Any] | str:
    """The JSON object in `file`, or what is wrong with it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{file}: no such file. A Hugging Face directory has one."
    except (OSError, ValueError) as error:
        return f"{file}: cannot be read as JSON ({error}). Download it again."
    return value if isinstance(value, dict) else f"{file}: a JSON object is expected, found {type(value).__name__}."
