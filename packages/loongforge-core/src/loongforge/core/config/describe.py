"""The text of `loongforge train --help`: every flag, grouped by section, with the docstring of its field."""

from __future__ import annotations

import ast
import inspect
import shutil
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from loongforge.core.config.flags import (
    AGREED,
    ALIASES,
    GEOMETRY,
    NEEDLESS,
    OWN,
    Flag,
    accepted,
    flag_name,
    is_component,
)
from loongforge.core.config.run import ComponentConfig, ComponentParallel, RunConfig

USAGE = """\
usage: loongforge train --config-file FILE.yaml | --model-name NAME | --load DIR  [flags] [overrides]

Flags are spelled as Megatron spells them, with dashes or underscores; a [true|false] flag has a --no- form too.
Overrides are Hydra's, SECTION.FIELD=VALUE; `+`, `++` and no mark mean the same, `~SECTION.FIELD` takes a value back.
Later wins: defaults, model YAML, run YAML, flags, overrides.

examples:
  loongforge train --load Qwen3-0.6B --training-phase sft --data-path chats.jsonl --train-iters 100 --save run
  loongforge train --model-name qwen3-0.6b --data-path 0.3 a.jsonl 0.7 b --bf16 --tensor-model-parallel-size 2
  loongforge train --config-file run.yaml --lr 1e-5 +model.foundation.freeze=true optimizer.clip_grad=0.5
  loongforge train --model-name qwen3-vl-8b --load Qwen3-VL-8B +model.image_encoder.tensor-model-parallel-size=1
"""


@cache
def field_docs(kind: type) -> Mapping[str, str]:
    """Docstrings of a dataclass's fields by name, read from its source; empty where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(sys.modules[kind.__module__])))
    except (OSError, KeyError):
        return {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == kind.__name__:
            return {
                name.target.id: inspect.cleandoc(text.value.value)
                for name, text in zip(node.body, node.body[1:], strict=False)
                if isinstance(name, ast.AnnAssign)
                and isinstance(name.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            }
    return {}


def describe_flags() -> str:
    """Help for every flag: usage, examples, and each section of the run."""
    width = min(shutil.get_terminal_size().columns, 120)
    parts = [USAGE, _where(width)]
    hints = get_type_hints(RunConfig)
    top = [name for name, kind in hints.items() if not is_dataclass(kind)]
    for name, kind in hints.items():
        if is_dataclass(kind):
            parts.append(_section(name, kind, width))  # pyright: ignore[reportArgumentType]
    rows = [_row(accepted()[name.replace("_", "-")], RunConfig, name, width) for name in top]
    parts.append("run\n" + "\n".join(rows))
    parts += [_shape(width), _components(width)]
    parts.append(_stated(width))
    return "\n\n".join(parts) + "\n"


def _where(width: int) -> str:
    texts = {
        "--config-file FILE": "YAML of the run; its `defaults` name the model.",
        "--model-name NAME": "A size that an installed family ships: `loongforge list models`.",
        "--load DIR": "A run to resume, or a Hugging Face directory, which is enough to name the model.",
    }
    return "model\n" + "\n".join(_entry(name, text, width) for name, text in texts.items())


def _section(prefix: str, kind: type, width: int) -> str:
    rows = [
        _row(accepted()[flag_name(f"{prefix}.{one.name}")], kind, one.name, width, f"{prefix}.{one.name}")
        for one in fields(kind)
        if not is_component(get_type_hints(kind)[one.name])
    ]
    return f"{prefix}.*  {inspect.cleandoc(kind.__doc__ or '').splitlines()[0]}\n" + "\n".join(rows)


def _row(flag: Flag, kind: type, name: str, width: int, path: str = "") -> str:
    text = field_docs(kind).get(name, "")
    others = [
        f"--{other.name}" for other in (*ALIASES, *OWN) if path and other.path == path and other.name != flag.name
    ]
    default = next(one.default for one in fields(kind) if one.name == name)
    if default not in (None, (), False) and isinstance(default, str | int | float | bool | tuple):
        text += f" [{' '.join(default) if isinstance(default, tuple) else default}]"  # pyright: ignore
    if others:
        text += f" Also: {', '.join(others)}."
    return _entry(f"--{flag.name} {_value(get_type_hints(kind)[name])}".rstrip(), text, width)


def _value(hint: Any) -> str:
    """What follows a flag of this type."""
    if hint is bool:
        return "[true|false]"
    if get_origin(hint) is Literal:
        return "|".join(str(one) for one in get_args(hint))
    inner = [one for one in get_args(hint) if one is not type(None)]
    if hint == tuple[str, ...]:
        return "VALUE ..."
    if inner:
        return _value(inner[0])
    return {int: "N", float: "X"}.get(hint, "TEXT")


def _shape(width: int) -> str:
    shared = [flag for flag in (*ALIASES, *OWN) if flag.path.startswith("model.foundation.")]
    names = ", ".join(f"--{flag.name}" for flag in (*GEOMETRY, *shared))
    intro = "model.foundation.*  The language model; a family without such a field refuses the flag\n"
    return intro + textwrap.fill(names, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)


def _components(width: int) -> str:
    """What every component of a composed model may say for itself; the foundation's layout is the run's."""
    intro = (
        "model.image_encoder.*  model.image_projector.*  model.foundation.*  A component of the model, as overrides "
        "such as +model.image_encoder.freeze=True. Of the foundation, the fields of parallel.* take the place of the "
        "layout fields here, except data_parallel_size"
    )
    rows = [
        _entry(f"{one.name}={_value(get_type_hints(kind)[one.name])}", field_docs(kind).get(one.name, ""), width)
        for kind in (ComponentConfig, ComponentParallel)
        for one in fields(kind)
        if one.name not in ("geometry", "parallel")
    ]
    rows += [
        _entry(f"--{flag.name} N", f"Sets {flag.path}.", width) for flag in OWN if flag.path.startswith("model.image_")
    ]
    return "\n".join([textwrap.fill(intro, width, subsequent_indent="  "), *rows])


def _stated(width: int) -> str:
    names = ", ".join(f"--{flag.name}" + (f" {flag.accepts[0]}" if flag.accepts else "") for flag in AGREED)
    intro = "accepted because it is always so here\n"
    told = intro + textwrap.fill(names, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    needless = ", ".join(f"--{flag.name}" for flag in NEEDLESS)
    intro = "\naccepted, and changes nothing: there is nothing to decide\n"
    return (
        told
        + intro
        + textwrap.fill(needless, width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    )


def _entry(name: str, text: str, width: int) -> str:
    body = textwrap.fill(" ".join(text.split()), width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {name}\n{body}" if text else f"  {name}"
