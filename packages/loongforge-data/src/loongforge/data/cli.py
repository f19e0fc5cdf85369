"""`loongforge data`: prepare data ahead of a run, and look at it."""

from __future__ import annotations

import argparse

from loongforge.data.convert import parser as convert
from loongforge.data.tools import cache, fit_costs, inspect, pack, preprocess

_EXAMPLES = """examples:
  loongforge data preprocess corpus.jsonl --output data/corpus --hf-tokenizer-path Qwen3-0.6B --append-eod --workers 8
  loongforge data inspect data/corpus --hf-tokenizer-path Qwen3-0.6B
  loongforge data inspect chats.jsonl --hf-tokenizer-path Qwen3-0.6B --row 3

loongforge data VERB --help says more about each.
"""


def command(argv: list[str]) -> int:
    """The verb `data`: run the subcommand in `argv` and return its exit code; `DataError` for what a user can mend."""
    parser = _parser()
    arguments, rest = parser.parse_known_args([_dashed(word) for word in argv])
    if rest and not getattr(arguments, "takes_run", False):  # else what `train` takes
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loongforge data",
        description="Prepare and look at data.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    preprocess.add_parser(verbs)
    cache.add_parser(verbs)
    inspect.add_parser(verbs)
    pack.add_parser(verbs)
    convert.add_parser(verbs)
    fit_costs.add_parser(verbs)
    return parser


def _dashed(word: str) -> str:
    """`--append_eod` as `--append-eod`; a value after `=` stays as it is."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
