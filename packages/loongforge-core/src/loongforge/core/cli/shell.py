"""Find the verb, run it, and turn its errors into text and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

from loongforge.core import env, plugins
from loongforge.core.errors import ConfigError, ForgeError, PluginError

Command = Callable[[list[str]], int]

VERBS = {
    "train": "Train a model; starts its own workers or runs under torchrun, Slurm or Kubernetes.",
    "plan": "Show layout, memory and communication of a run; needs no accelerator.",
    "list": "List models, platforms, kernels, data sources, checkpoint formats, trackers or commands.",
    "show": "Show one of them: what it is, whose it is, what it needs, where its files lie.",
    "doctor": "Examine this machine: versions, platform, plugins, environment.",
    "schema": "Print the JSON schema of a run's YAML, for editors.",
    "new-model": "Make a package of your own that begins as one of the language models.",
    "quickstart": "Train, fine-tune, export and ask a small model, start to end, on this machine.",
}
"""The built-in verbs. They cannot be replaced: a wheel's verb of the same name answers to `owner:name`."""

PROVIDERS = {
    "bench.mtp": "loongforge-ckpt",
    "bench.step": "loongforge-ckpt",
    "convert": "loongforge-ckpt",
    "verify": "loongforge-ckpt",
    "data": "loongforge-data",
}
"""Verbs of our other wheels, so that one can say what to install when it is absent."""

EXAMPLES = """\
examples:
  loongforge quickstart
  loongforge quickstart --vlm
  loongforge list models
  loongforge train --model-name qwen3-0.6b --load HF_DIR --data-path text.jsonl --train-iters 100
  loongforge plan --model-name qwen3-8b --tensor-model-parallel-size 4 --world 8

loongforge VERB --help says more about a verb; loongforge --install-completion sets up the shell's Tab key.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that `argv` names (the process's arguments by default) and return its exit code.

    A `ForgeError` is printed on stderr, one `error:` a problem, and gives its own exit code; Ctrl-C gives 130.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = run(words)
        sys.stdout.flush()  # a closed pipe must show here, not in the interpreter's own last flush
        return code
    except ForgeError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `loongforge list | head` is no mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def run(words: list[str]) -> int:
    """Run one command line."""
    if env.completing() or words[:1] in (["--install-completion"], ["--show-completion"]):
        from loongforge.core.cli.completion import complete

        return complete(words)
    if not words or words[0] in ("-h", "--help"):
        print(usage(), end="")
        return 0
    if words[0] in ("-V", "--version"):
        print(f"loongforge {version('loongforge-core')}")
        return 0
    verb, rest = _verb(words)
    if verb == words[0] and verb not in VERBS and (members := _members(verb)) and not _is_registered(verb):
        return _group(verb, members, rest)
    return find(verb)(rest)


def _verb(words: list[str]) -> tuple[str, list[str]]:
    """The verb and its arguments: one registered as `bench.mtp` is said in two words."""
    both = ".".join(words[:2])
    return (both, words[2:]) if words[0] not in VERBS and _is_registered(both) else (words[0], words[1:])


def _is_registered(verb: str) -> bool:
    return verb.rpartition(":")[2] in plugins.registered("commands")


def _members(group: str) -> list[str]:
    """What may follow a word that is the beginning of registered verbs: `mtp` after `bench`."""
    return [name.partition(".")[2] for name in plugins.registered("commands") if name.startswith(f"{group}.")]


def _group(group: str, members: list[str], rest: list[str]) -> int:
    """The first word of verbs of two words, without a second one that there is."""
    if rest and rest[0] not in ("-h", "--help"):
        _check_provided(f"{group}.{rest[0]}")
        hint = plugins.did_you_mean(rest[0], members)
        raise ConfigError(f"no verb {group!r} {rest[0]!r}.{hint} Known: {', '.join(members)}.")
    print(f"usage: loongforge {group} WHAT [arguments]\n")
    print("\n".join(line for line in _registered_verbs() if line.strip().startswith(f"{group} ")))
    return 0


def find(verb: str) -> Command:
    """The command behind a verb: a built-in one, or the one another wheel registered.

    Raises `ConfigError` with a hint when nobody has it, `PluginError` when its owner cannot provide it.
    """
    if verb in VERBS:
        return import_module(f"loongforge.core.cli.{verb.replace('-', '_')}").command
    known = plugins.registered("commands")
    if verb.rpartition(":")[2] in known:
        return plugins.load("commands", verb).command()
    if verb.startswith("-"):
        raise ConfigError(f"{verb}: give the verb first: loongforge VERB {verb} ... . Verbs: {', '.join(VERBS)}.")
    _check_provided(verb)
    verbs = sorted({*VERBS, *known})
    raise ConfigError(f"no verb {verb!r}.{plugins.did_you_mean(verb, verbs)} Known: {', '.join(verbs)}.")


def _check_provided(verb: str) -> None:
    """`ConfigError` that says what to install where a verb of our other wheels is absent."""
    if owner := PROVIDERS.get(verb):
        said = verb.replace(".", " ")
        raise ConfigError(f"the verb {said!r} comes with {owner}, which is not in use here: pip install {owner}")


def usage() -> str:
    """The text of `loongforge --help`."""
    lines = [
        "usage: loongforge VERB [arguments]",
        "",
        "Train large transformer models of every modality.",
        "",
        "verbs:",
    ]
    lines += [f"  {verb:14} {summary}" for verb, summary in VERBS.items()]
    try:
        lines += _registered_verbs()
    except PluginError as error:  # LOONGFORGE_PLUGINS is wrong: help must still help
        lines += ["", f"error: {error}"]
    return "\n".join([*lines, "", EXAMPLES])


def _registered_verbs() -> list[str]:
    lines: list[str] = []
    for name, rivals in plugins.registered("commands").items():
        for plugin in rivals:
            typed = name if len(rivals) == 1 and name not in VERBS else f"{plugin.distribution}:{name}"
            state = plugin.state()
            summary = plugin.spec.summary if state == "ready" else state
            lines.append(f"  {typed.replace('.', ' '):14} {summary} ({plugin.distribution})")
    return lines
