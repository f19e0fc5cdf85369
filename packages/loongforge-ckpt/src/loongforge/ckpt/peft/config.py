"""`adapter_config.json`: what it says of adapters, in our words and back. Imports no torch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loongforge.core.config.lora import ALL_LINEAR, REGEX
from loongforge.core.errors import CheckpointError
from loongforge.core.lora.targets import Adapter, AdapterSet

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

EXPERT = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
"""The number of an expert in the name of a module."""
READ = frozenset(
    {
        *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern"),
        # these say nothing about what the numbers mean
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "megatron_config", "megatron_core", "qalora_group_size", "runtime_config"),
        *("ensure_weight_tying",),
    }
)
"""Fields that are understood."""
PLAIN: Mapping[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, False, "gaussian")}
"""Fields with the values that change nothing; every other field must be empty, false or absent."""


def detect(path: str | Path) -> bool:
    """Whether the directory holds adapters."""
    return (Path(path) / CONFIG).is_file()


def read(path: Path) -> dict[str, Any]:
    """Contents of `adapter_config.json`; `CheckpointError` when it is unreadable or asks for what is not here."""
    file = path / CONFIG
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory. Give a directory that holds {CONFIG} and {WEIGHTS}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: has no {CONFIG}, so it is no adapter that PEFT has written.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: a JSON object is expected, found {type(content).__name__}.")
    if found := list(_refused(content)):
        raise CheckpointError("\n".join(f"{file}: {problem}" for problem in found))
    return content


def read_config(path: str | Path) -> dict[str, Any]:
    """The section `lora` that the directory describes: rank, alpha, rslora, dropout, target_modules, patterns."""
    content = read(Path(path))
    patterns = [
        f"{REGEX}(.*\\.)?({key}) {name}={value}"
        for name, field in (("rank", "rank_pattern"), ("alpha", "alpha_pattern"))
        for key, value in (content.get(field) or {}).items()
    ]
    return {
        "rank": content["r"],
        "alpha": float(content.get("lora_alpha", content["r"])),
        "dropout": float(content.get("lora_dropout") or 0.0),
        "rslora": bool(content.get("use_rslora")),
        "target_modules": list(_targets(content["target_modules"])),
        "patterns": patterns,
    }


def _targets(named: Any) -> Iterator[str]:
    if isinstance(named, str):
        yield named if named == ALL_LINEAR else REGEX + named
    else:
        # Here all experts of a layer have an adapter or none; the tensors say whether these are all of them.
        yield from sorted({EXPERT.sub("*", name) for name in named})


def _refused(content: Mapping[str, Any]) -> Iterator[str]:
    kind = content.get("peft_type")
    if kind != "LORA":
        yield f"peft_type={kind!r} is not LORA, the one kind of adapter that is trained here."
        return
    for name in ("r", "target_modules"):
        if not content.get(name):
            yield f"{name} is absent: it says nothing of the adapters."
    if named := content.get("target_parameters"):
        yield (
            f"target_parameters={sorted(named)} are adapters of stacked experts, one A for gate and up together; here "
            "each module has its own. Train adapters with target_modules instead."
        )
    for name, value in content.items():
        if name in READ or name == "target_parameters":
            continue
        allowed = PLAIN.get(name)
        if value not in allowed if allowed else value not in (None, False, "", [], {}):
            yield f"{name}={value!r} is not supported: only plain LoRA (Hu et al., 2021), rslora included, is."
    for text in (*(content.get("rank_pattern") or {}), *(content.get("alpha_pattern") or {})):
        if re.search(r"\s", text):
            yield f"the pattern {text!r} holds a blank, which no name of a module does."


def written(adapters: AdapterSet) -> dict[str, Any]:
    """Contents of `adapter_config.json` for these adapters: PEFT finds the same modules, ranks and scales."""
    every = adapters.adapters
    rank = Counter(one.rank for one in every).most_common(1)[0][0]
    alpha = Counter(one.alpha for one in every if one.rank == rank).most_common(1)[0][0]
    # Stacked experts and routers of transformers are parameters to PEFT, and those have no dropout.
    dropout = max(one.dropout for one in every)
    parameters = any(one.matrix.experts is not None or one.matrix.is_router for one in every)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapters.base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0 if parameters else dropout,
        "use_rslora": every[0].rslora,
        "target_modules": sorted(
            name
            for module in _names({one.matrix.module for one in every}, adapters.modules)
            for name in _filled(module, every)
        ),
        "rank_pattern": _pattern(every, {one.matrix.module: one.rank for one in every if one.rank != rank}),
        "alpha_pattern": _pattern(every, {one.matrix.module: _plain(one.alpha) for one in every if one.alpha != alpha}),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _names(some: set[str], every: Iterable[str]) -> set[str]:
    """Shortest ends of names that mean `some` among `every`: the last word where all modules with it are meant.

    A number is no such word: layers end in one too.
    """
    shared = {module.rpartition(".")[2] for module in every if module not in some}
    return {module if (leaf := module.rpartition(".")[2]) in shared or leaf.isdigit() else leaf for module in some}


def _filled(module: str, every: Iterable[Adapter]) -> tuple[str, ...]:
    """A name for every expert where the module is theirs."""
    return next((one.matrix.names for one in every if one.matrix.module == module), (module,))


def _pattern(every: Iterable[Adapter], values: Mapping[str, float]) -> dict[str, float]:
    """Modules to the number that differs from the usual one, as regular expressions of the ends of their names."""
    found: dict[str, float] = {}
    modules = [one.matrix.module for one in every]
    for value in dict.fromkeys(values.values()):
        for name in sorted(_names({module for module, other in values.items() if other == value}, modules)):
            found[re.escape(name).replace(re.escape("{expert}"), r"\d+")] = value
    return found


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number
