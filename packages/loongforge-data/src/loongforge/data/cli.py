"""`loongforge data`: prepare data ahead of a run, and look at it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from loongforge.core.errors import DataError

if TYPE_CHECKING:
    from loongforge.data.tokenise import TokenizerChoice

_EXAMPLES = """examples:
  loongforge data preprocess corpus.jsonl --output data/corpus --hf-tokenizer-path Qwen3-0.6B --append-eod --workers 8
  loongforge data inspect data/corpus --hf-tokenizer-path Qwen3-0.6B
  loongforge data inspect chats.jsonl --hf-tokenizer-path Qwen3-0.6B --row 3
"""
_PREPROCESS = """Tokenise .jsonl files (one document per row) and .txt files (one document each) into PREFIX.bin and
PREFIX.idx, the format of Megatron. Bad rows are named by file and line, and nothing is written then."""
_INSPECT = """Say what a .bin/.idx pair or a .jsonl file holds: documents, tokens, lengths, and one document. For
conversations, show one as the model sees it, with [[ and ]] around what is trained on."""


def command(argv: list[str]) -> int:
    """The verb `data`: run the subcommand in `argv` and return its exit code; `DataError` for what a user can mend."""
    arguments = _parser().parse_args([_dashed(word) for word in argv])
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="loongforge data", description="Prepare and look at data.", epilog=_EXAMPLES, formatter_class=raw
    )
    verbs = parser.add_subparsers(required=True, metavar="{preprocess,inspect}")
    tokenizer = argparse.ArgumentParser(add_help=False)
    tokenizer.add_argument("--hf-tokenizer-path", metavar="DIR", help="directory with tokenizer.json")
    tokenizer.add_argument("--tokenizer-type", choices=("HFTokenizer", "NullTokenizer"))
    tokenizer.add_argument("--vocab-size", type=int, metavar="N", help="tokens of the model (NullTokenizer needs it)")

    one = verbs.add_parser(
        "preprocess",
        parents=[tokenizer],
        description=_PREPROCESS,
        epilog=_EXAMPLES,
        formatter_class=raw,
        help=".jsonl or .txt to .bin/.idx",
    )
    one.add_argument("inputs", nargs="+", metavar="INPUT", help="files, written one after the other")
    one.add_argument("--output", required=True, metavar="PREFIX", help="written as PREFIX.bin and PREFIX.idx")
    one.add_argument("--json-keys", default="text", metavar="FIELD", help="field that holds the text (default text)")
    one.add_argument("--append-eod", action="store_true", help="end every document with the end token")
    one.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default 0: threads of this one)")
    one.add_argument("--overwrite", action="store_true", help="replace PREFIX when it exists")
    one.set_defaults(run=_preprocess)

    two = verbs.add_parser(
        "inspect",
        parents=[tokenizer],
        description=_INSPECT,
        epilog=_EXAMPLES,
        formatter_class=raw,
        help="say what a file holds",
    )
    two.add_argument("path", metavar="PATH", help="prefix of a .bin/.idx pair, or a .jsonl file of conversations")
    two.add_argument("--row", type=int, default=1, metavar="N", help="document or row to show, from 1 (default 1)")
    two.add_argument("--messages-field", default="messages", metavar="FIELD")
    two.add_argument("--chat-template", metavar="FILE", help="Jinja template that replaces the tokenizer's own")
    two.set_defaults(run=_inspect)
    return parser


def _preprocess(arguments: argparse.Namespace) -> int:
    from loongforge.data.tokenise import write_documents

    choice = _choice(arguments)
    inputs = [Path(name) for name in arguments.inputs]
    for path in inputs:
        if not path.is_file():
            raise DataError(f"no file {path}.")
        if path.suffix not in (".jsonl", ".json", ".txt"):
            raise DataError(f"{path}: .jsonl, .json and .txt files can be tokenised.")
    if arguments.workers < 0:
        raise DataError(f"--workers must be 0 or more, got {arguments.workers}.")
    existing = [name for name in (f"{arguments.output}.bin", f"{arguments.output}.idx") if Path(name).exists()]
    if existing and not arguments.overwrite:
        raise DataError(f"{existing[0]} exists: choose another --output or say --overwrite.")
    written = write_documents(
        inputs,
        arguments.output,
        choice,
        field=arguments.json_keys,
        append_eod=arguments.append_eod,
        workers=arguments.workers,
    )
    print(f"{arguments.output}.bin and .idx: {written.documents} documents, {written.tokens} tokens")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    path = Path(arguments.path)
    if path.suffix in (".jsonl", ".json"):
        return _inspect_chat(arguments, path)
    import numpy as np

    from loongforge.data.indexed import IndexedFile

    file = IndexedFile(arguments.path)
    starts, ends = file.spans(np.arange(file.documents))
    lengths = ends - starts
    print(f"{file.prefix}: {file.documents} documents, {file.tokens} tokens")
    print(f"document length: min {lengths.min()}, median {int(np.median(lengths))}, max {lengths.max()}")
    _require_row(arguments.row, file.documents)
    shown = min(64, int(lengths[arguments.row - 1]))
    tokens = file.read(int(starts[arguments.row - 1]), shown).tolist()
    print(f"document {arguments.row} begins: {' '.join(map(str, tokens))}")
    if arguments.hf_tokenizer_path is not None:
        print(_choice(arguments).open().decode(tokens))
    return 0


def _inspect_chat(arguments: argparse.Namespace, path: Path) -> int:
    from loongforge.data.conversations import ChatRules, text_conversation
    from loongforge.data.rows import BadRows, parse_row, read_lines

    rules = ChatRules(
        choice=_choice(arguments),
        template_file=arguments.chat_template,
        messages_field=arguments.messages_field,
        train_on_prompt=False,
        overlong="error",
        seq_length=0,
    )
    finder, bad, rows = rules.finder(), BadRows(), 0
    for number, line in read_lines(path, bad):
        rows += 1
        if rows != arguments.row:
            continue
        try:
            said = text_conversation(parse_row(line), messages_field=arguments.messages_field)
            text, spans = finder.spans(said.messages, said.tools)
            encoded = finder.encode(said.messages, said.tools)
        except ValueError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        for start, end in reversed(spans):
            text = f"{text[:start]}[[{text[start:end]}]]{text[end:]}"
        print(text)
        print(f"-- row {rows}: {len(encoded.tokens)} tokens, {int(encoded.assistant.sum())} trained on")
    bad.check()
    _require_row(arguments.row, rows)
    print(f"-- {path}: {rows} rows")
    return 0


def _require_row(row: int, rows: int) -> None:
    if not 1 <= row <= rows:
        raise DataError(f"--row {row}: there are {rows}, counted from 1.")


def _choice(arguments: argparse.Namespace) -> TokenizerChoice:
    from loongforge.data.tokenise import TokenizerChoice
    from loongforge.data.tokenizer import HFTokenizer

    size = arguments.vocab_size
    if size is None and arguments.tokenizer_type == "NullTokenizer":
        raise DataError("NullTokenizer needs --vocab-size.")
    if size is None and arguments.hf_tokenizer_path is not None:
        size = HFTokenizer(arguments.hf_tokenizer_path).vocab_size
    return TokenizerChoice(path=arguments.hf_tokenizer_path, kind=arguments.tokenizer_type, vocab_size=size or 0)


def _dashed(word: str) -> str:
    """`--append_eod` as `--append-eod`; a value after `=` stays as it is."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value
