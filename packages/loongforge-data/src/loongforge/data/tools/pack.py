"""`loongforge data pack`: which rows share a sequence, decided before a run and written down."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loongforge.core.errors import DataError
from loongforge.data.tools.cache import add_run_options, planned
from loongforge.data.tools.options import subcommand

if TYPE_CHECKING:
    from loongforge.core.data.contract import SourceRequest
    from loongforge.data.sequences import Packed

_DOES = """Pack the conversations of a fine-tuning run into sequences of --seq-length and write into DIR which rows
share one: pack_plan.jsonl, a line for each sequence; left_out.jsonl, a line for every row that is dropped, shortened or
split, with its rule; packing.json, the account and the yield beside the least number of sequences. DIR is a data cache
too: `loongforge train` with the same arguments and --data-cache-path DIR reads just these packs and tokenises nothing.
Takes what `loongforge train` takes."""
_EXAMPLES = """\
  loongforge data pack --output packed --load Qwen3-0.6B --training-phase sft --data-path chats.jsonl \\
    --seq-length 8192 --overlong drop --train-iters 1000
  loongforge data pack --output packed --config-file run.yaml --world 64
"""
PLAN, LEFT_OUT, ACCOUNT = "pack_plan.jsonl", "left_out.jsonl", "packing.json"


def add_parser(verbs: Any) -> None:
    """Add the subcommand."""
    parser = subcommand(verbs, "pack", does=_DOES, examples=_EXAMPLES, help="pack conversations ahead of a run")
    add_run_options(parser)
    parser.usage = f"{parser.usage} --output DIR"
    parser.add_argument("--output", required=True, metavar="DIR", help="written there; a data cache for train")
    parser.set_defaults(run=_run, takes_run=True)


def _run(arguments: argparse.Namespace) -> int:
    if any(word.partition("=")[0] in ("--data-cache-path", "data.data_cache_path") for word in arguments.rest):
        raise DataError("--data-cache-path: the packs lie in --output DIR, which is the cache; give that one alone.")
    plan = planned([*arguments.rest, "--data-cache-path", arguments.output], arguments.world)
    from loongforge.core.data.ahead import open_ahead, request_ahead

    request = request_ahead(plan)
    if not request.packing:
        raise DataError("nothing to pack: sequences are packed with --training-phase sft and without --no-packing.")
    data, _ = open_ahead(plan)
    account = write_plan(getattr(data.train, "packed", []), request, Path(arguments.output))
    if arguments.json:
        print(json.dumps(account, indent=2))
        return 0
    left = ", ".join(f"{count} {done}" for done, count in account["left_out"].items()) or "none left out"
    print(
        f"{account['rows']} rows ({left}), {account['conversations']} conversations in {account['packs']} packs of "
        f"{account['seq_length']} ({account['bound']} at least), {account['filled']:.1%} full"
    )
    print(f"{arguments.output}/{PLAN}; train with the same arguments and --data-cache-path {arguments.output}")
    return 0


def write_plan(corpora: list[Packed], request: SourceRequest, folder: Path) -> dict[str, Any]:
    """Write the packs of all corpora row by row; the account, which adds up or is a `DataError`."""
    from loongforge.data.pack import pack_bound
    from loongforge.data.sequences import padded

    if not corpora:
        raise DataError("this source does not say what it packs; of ours 'chat' and 'vlm' do.")
    totals: Counter[str] = Counter()
    left: Counter[str] = Counter()
    with _Lines(folder / PLAN) as plan, _Lines(folder / LEFT_OUT) as notes:
        for number, corpus in enumerate(corpora):
            rows = list(_rows(corpus, totals, left, notes))
            rows = rows[corpus.first : corpus.first + len(corpus.lengths)]
            sizes = padded(corpus.lengths - 1, request.segment_multiple)
            for place in range(len(corpus.packs)):
                members = corpus.packs[place].tolist()
                chosen = [rows[member] for member in members]
                taken = [int(sizes[member]) for member in members]
                plan.write(
                    {"pack": totals["packs"] + place, "corpus": number, "rows": chosen, "lengths": taken}
                    | {"total": sum(taken)}
                )
            packed = len(corpus.packs.items)
            if packed != len(corpus.lengths) or len(rows) != packed:
                raise _lost(corpus, len(rows), packed)
            totals.update(packs=len(corpus.packs), conversations=packed, positions=int((corpus.lengths - 1).sum()))
            totals.update(bound=pack_bound(sizes, request.seq_length))
    account = {
        "seq_length": request.seq_length,
        "segment_multiple": request.segment_multiple,
        **{name: totals[name] for name in ("rows", "conversations", "packs", "bound", "positions")},
        "filled": round(totals["positions"] / (totals["packs"] * request.seq_length), 4),
        "held_out": totals["made"] - totals["conversations"],
        "left_out": dict(left),
    }
    (folder / ACCOUNT).write_text(json.dumps(account, indent=2) + "\n")
    return account


def _rows(corpus: Packed, totals: Counter[str], left: Counter[str], notes: _Lines) -> Iterator[list[Any]]:
    """File and row of every conversation, in their order; what became of the other rows is counted and noted.

    `DataError` when a file does not have as many conversations as its rows and notes make.
    """
    from loongforge.data.accounts import FILE
    from loongforge.data.visual_file import sources

    for path, cache, kept in zip(corpus.paths, corpus.caches, corpus.kept, strict=True):
        noted: dict[tuple[str, int | str], int] = {}  # by file name: the path may have been spelled otherwise
        if (cache / FILE).is_file():
            with open(cache / FILE, encoding="utf-8") as stream:
                for line in stream:
                    note = json.loads(line)
                    noted[Path(note["path"]).name, note["row"]] = note["pieces"]
                    left[note["done"]] += 1
                    notes.write(note)
        made = 0
        for file in sources(path):
            for row in _numbers(file):
                totals["rows"] += 1
                pieces = noted.pop((file.name, row), 1)
                made += pieces
                for piece in range(pieces):
                    yield [str(file), row] if pieces == 1 else [str(file), row, piece]
        if made != kept or noted:
            raise _lost(corpus, made, kept)
        totals["made"] += made


def _numbers(file: Path) -> Iterator[int | str]:
    """Rows of a file as notes call them."""
    from loongforge.data.index import glance
    from loongforge.data.row_files import LINES, count_of
    from loongforge.data.rows import BadRows, read_lines

    if file.suffix == ".tar":
        index = glance(file)
        yield from (f"key {index.key(number)!r}" for number in range(len(index)))
        yield from (problem.place for problem in index.problems)
    elif file.suffix in LINES:
        yield from (number for number, _ in read_lines(file, BadRows()))
    else:
        yield from range(1, count_of(file) + 1)


def _lost(corpus: Packed, expected: int, found: int) -> DataError:
    return DataError(
        f"{', '.join(corpus.paths)}: its rows make {expected} conversations and {found} are packed: some were lost, or "
        "the files were changed meanwhile. Delete the cache and pack again."
    )


class _Lines:
    """A `.jsonl` file that appears when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._draft = path.with_name(f"{path.name}.writing")

    def __enter__(self) -> _Lines:
        self._stream = open(self._draft, "w", encoding="utf-8")
        return self

    def write(self, row: dict[str, Any]) -> None:
        """One line."""
        self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stream.close()
        if kind is None:
            self._draft.replace(self._path)
        else:
            self._draft.unlink()
