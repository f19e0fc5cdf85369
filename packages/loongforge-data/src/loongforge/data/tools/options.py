"""Options that several subcommands of `loongforge data` share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from loongforge.core.errors import DataError

if TYPE_CHECKING:
    from loongforge.data.tokenise import TokenizerChoice

_KINDS = {"HFTokenizer": "HFTokenizer", "HuggingFaceTokenizer": "HFTokenizer", "NullTokenizer": "NullTokenizer"}


def subcommand(verbs: Any, name: str, *, does: str, help: str, examples: str) -> argparse.ArgumentParser:
    """A parser that shows its examples after its options."""
    return verbs.add_parser(
        name,
        description=does,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help=help,
        allow_abbrev=False,
    )


def add_tokenizer_options(parser: argparse.ArgumentParser) -> None:
    """What says which tokenizer, in the words of `train` and of Megatron."""
    parser.add_argument(
        "--hf-tokenizer-path", "--tokenizer-model", metavar="DIR", help="directory with tokenizer.json (one thing)"
    )
    parser.add_argument("--tokenizer-type", choices=_KINDS)
    parser.add_argument("--vocab-size", type=int, metavar="N", help="tokens of the model (NullTokenizer needs it)")


def choice_of(arguments: argparse.Namespace) -> TokenizerChoice:
    """The tokenizer that the options say; `DataError` when it lacks its vocabulary size."""
    from loongforge.data.tokenise import TokenizerChoice
    from loongforge.data.tokenizer import HFTokenizer

    kind, size = _KINDS.get(arguments.tokenizer_type), arguments.vocab_size
    if size is None and kind == "NullTokenizer":
        raise DataError("NullTokenizer needs --vocab-size.")
    if size is None and arguments.hf_tokenizer_path is not None:
        size = HFTokenizer(arguments.hf_tokenizer_path).vocab_size
    return TokenizerChoice(path=arguments.hf_tokenizer_path, kind=kind, vocab_size=size or 0)
