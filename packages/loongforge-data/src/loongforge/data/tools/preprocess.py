"""`loongforge data preprocess`: text to token files, ahead of a run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loongforge.core.errors import DataError
from loongforge.data.tools.options import add_tokenizer_options, choice_of, subcommand

_DOES = """Tokenise .jsonl, .json, .parquet and .arrow files (one document per row), directories of them, and .txt
files (one document each) into PREFIX.bin and PREFIX.idx, the format of Megatron. Bad rows are named by file and line,
and nothing is written then. A run that was killed goes on where it was when the same command is given again; until it
is done, PREFIX is not there."""
_EXAMPLES = """\
  loongforge data preprocess corpus.jsonl --output data/corpus --hf-tokenizer-path Qwen3-0.6B --append-eod --workers 8
  loongforge data preprocess a.parquet b.parquet --output data/ab --split 98,1,1 --hf-tokenizer-path Qwen3-0.6B
  loongforge data preprocess --input rows.jsonl --output-prefix data/rows --json-keys title body --append-eod \\
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model Qwen3-0.6B      # data/rows_title_document.bin ...
  loongforge data preprocess corpus.jsonl --output data/corpus --hf-tokenizer-path Qwen3-0.6B --engine ray
"""


def add_parser(verbs: Any) -> None:
    """Add the subcommand."""
    from loongforge.data.engine import add_engine_options

    parser = subcommand(verbs, "preprocess", does=_DOES, examples=_EXAMPLES, help="text to .bin/.idx")
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="files or directories of them, one after the other")
    parser.add_argument("--input", nargs="+", default=[], metavar="INPUT", help="the same, in Megatron's words")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--output", metavar="PREFIX", help="written as PREFIX.bin and PREFIX.idx; with several keys as below"
    )
    target.add_argument("--output-prefix", metavar="PREFIX", help="written as PREFIX_KEY_document.bin, as in Megatron")
    parser.add_argument(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="fields that hold text, a pair of files for each",
    )
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end token")
    parser.add_argument(
        "--split", metavar="98,1,1", help="write PREFIX_train, PREFIX_valid and PREFIX_test, shares of the documents"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_engine_options(parser)
    add_tokenizer_options(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from loongforge.data.documents import target_prefixes, write_documents
    from loongforge.data.engine import open_engine
    from loongforge.data.parts import TextRules

    inputs = [file for name in (*arguments.inputs, *arguments.input) for file in _files(Path(name))]
    _check_inputs(inputs, arguments.json_keys)
    prefixes = _prefixes(arguments)
    targets = [target for prefix in prefixes for target in target_prefixes(prefix, arguments.split)]
    existing = [name for target in targets for name in (f"{target}.bin", f"{target}.idx") if Path(name).exists()]
    if existing and not arguments.overwrite:
        raise DataError(f"{existing[0]} exists: choose another --output or say --overwrite.")
    rules = TextRules(choice=choice_of(arguments), fields=tuple(arguments.json_keys), append_eod=arguments.append_eod)
    engine = open_engine(arguments.engine, arguments.workers)
    written = write_documents(inputs, prefixes, rules, engine, split=arguments.split)
    if arguments.json:
        print(json.dumps({"inputs": list(map(str, inputs)), "pairs": [asdict(pair) for pair in written]}, indent=2))
        return 0
    for pair in written:
        print(f"{pair.prefix}.bin and .idx: {pair.documents} documents, {pair.tokens} tokens")
    return 0


def _files(path: Path) -> list[Path]:
    """The file, or the files of rows in a directory."""
    from loongforge.data.row_files import row_files

    return row_files(path) if path.is_dir() else [path]


def _check_inputs(inputs: list[Path], keys: list[str]) -> None:
    """`DataError` for what can be said before anything is opened."""
    if not inputs:
        raise DataError("no input: name files, loongforge data preprocess FILE... --output PREFIX.")
    if len(set(keys)) < len(keys):
        raise DataError(f"--json-keys {' '.join(keys)}: a key comes twice.")
    text = [path for path in inputs if path.suffix == ".txt"]
    if text and len(keys) > 1:
        raise DataError(
            f"--json-keys {' '.join(keys)}: {text[0]} is one text without keys; give one key, or other files."
        )


def _prefixes(arguments: argparse.Namespace) -> list[str]:
    """Prefix of the pair of each key."""
    if arguments.output and len(arguments.json_keys) == 1:
        return [arguments.output]
    return [f"{arguments.output or arguments.output_prefix}_{key}_document" for key in arguments.json_keys]
