"""`loongforge data inspect`: what files hold, and what a training would make of them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loongforge.core.errors import DataError
from loongforge.data.tools.options import add_tokenizer_options, choice_of, subcommand

if TYPE_CHECKING:
    import numpy as np

    from loongforge.core.plan import Plan
    from loongforge.data.survey import Survey, SurveyRules

_DOES = """Say what files hold: rows, turns, images and videos, bytes of text, every row that cannot be used by file and
line or shard and key, and one row as the model sees it, with [[ and ]] around what is trained on. With a tokenizer also
lengths and their histogram; with --seq-length how full packed sequences would be; with --dp how unevenly data parallel
ranks would work, as loaded and balanced. Reads .jsonl and .parquet files, .tar shards, folders of shards, and .bin/.idx
pairs. A model (--load, --model-name or --config-file, as for train) says how long images are and what a row costs."""
_EXAMPLES = """\
  loongforge data inspect data/corpus --hf-tokenizer-path Qwen3-0.6B
  loongforge data inspect chats.jsonl --hf-tokenizer-path Qwen3-0.6B --row 3
  loongforge data inspect chats.jsonl --hf-tokenizer-path Qwen3-0.6B --seq-length 8192 --png lengths.png
  loongforge data inspect shards/ --load Qwen3-VL-8B --seq-length 32768 --dp 8,32,128 --micro-batches 4 --json
"""
_NAMED = 10
"""Bad rows that text names; --json has them all."""
_MODEL = ("load", "model_name", "config_file")


def add_parser(verbs: Any) -> None:
    """Add the subcommand."""
    from loongforge.data.engine import add_engine_options

    parser = subcommand(verbs, "inspect", does=_DOES, examples=_EXAMPLES, help="say what files hold")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files, folders of shards, or one prefix of .bin/.idx")
    parser.add_argument("--row", type=int, metavar="N", help="document or row to show, from 1 (default 1)")
    parser.add_argument("--messages-field", metavar="FIELD", help="list of messages (default messages)")
    parser.add_argument("--text-field", metavar="FIELD", help="text of a document (default text)")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja template that replaces the tokenizer's own")
    parser.add_argument("--seq-length", type=int, metavar="N", help="say how full packed sequences of N would be")
    parser.add_argument(
        "--dp", type=_numbers, metavar="8,32", help="data parallel sizes to forecast (--seq-length too)"
    )
    parser.add_argument(
        "--micro-batches", type=int, default=4, metavar="N", help="sequences of a rank and step (default 4)"
    )
    parser.add_argument("--png", metavar="FILE", help="draw the lengths")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    for name in _MODEL:
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="MODEL", help="the model, as for train")
    add_engine_options(parser)
    add_tokenizer_options(parser)
    parser.set_defaults(run=_run, takes_run=True)


def _run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    first = Path(arguments.paths[0])
    pair = not first.is_dir() and first.suffix not in (".jsonl", ".json", ".parquet", ".tar", ".txt")
    if pair and len(arguments.paths) > 1:
        raise DataError(f"{first}: one .bin/.idx pair is looked at at a time.")
    told, lines, lengths = _pair(arguments) if pair else _rows(arguments)
    if arguments.png:
        from loongforge.data.tools.lengths import draw

        if not len(lengths):
            raise DataError("--png: no length is known; give --hf-tokenizer-path DIR, or --load for images.")
        draw(lengths, arguments.seq_length, ", ".join(arguments.paths), Path(arguments.png))
        lines.append(f"{arguments.png}: the lengths, drawn")
    print(json.dumps(told, indent=2) if arguments.json else "\n".join(lines))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    for flag, value in (("--seq-length", arguments.seq_length), ("--micro-batches", arguments.micro_batches)):
        if value is not None and value < 1:
            raise DataError(f"{flag} must be 1 or more, got {value}.")
    if arguments.dp and arguments.seq_length is None:
        raise DataError("--dp needs --seq-length: ranks work on packed sequences.")
    model = any(getattr(arguments, name) for name in _MODEL)
    if arguments.rest and not model:
        raise DataError(f"unknown arguments: {' '.join(arguments.rest)}. See loongforge data inspect --help.")


def _pair(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], np.ndarray]:
    """A `.bin/.idx` pair."""
    import numpy as np

    from loongforge.data.indexed import IndexedFile
    from loongforge.data.tools.lengths import Lengths

    file = IndexedFile(arguments.paths[0])
    starts, ends = file.spans(np.arange(file.documents))
    lengths = Lengths.of(ends - starts)
    told = {"path": file.prefix, "documents": file.documents, "tokens": file.tokens, "lengths": asdict(lengths)}
    lines = [f"{file.prefix}: {file.documents} documents, {file.tokens} tokens", *lengths.lines("document length")]
    if arguments.seq_length is not None:
        told["samples"] = file.tokens // arguments.seq_length
        lines.append(f"{told['samples']} samples of --seq-length {arguments.seq_length} an epoch, all full")
    row = arguments.row or 1
    _require_row(row, file.documents)
    tokens = file.read(int(starts[row - 1]), min(64, int(ends[row - 1] - starts[row - 1]))).tolist()
    lines.append(f"document {row} begins: {' '.join(map(str, tokens))}")
    if arguments.hf_tokenizer_path is not None:
        lines.append(choice_of(arguments).open().decode(tokens))
    return told, lines, ends - starts


def _rows(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str], np.ndarray]:
    """Rows or shards."""
    import numpy as np

    from loongforge.data.engine import open_engine
    from loongforge.data.survey import survey

    plan = _plan(arguments)
    rules = _rules(arguments, plan)
    paths = [Path(path) for path in arguments.paths]
    lines = _shown(arguments, paths[0], rules)
    found = survey(paths, rules, open_engine(arguments.engine, arguments.workers))
    lengths = np.array(found.lengths, dtype=np.int64)
    told = _counts(arguments, found)
    lines += _count_lines(arguments, found, told)
    if len(lengths):
        _measured(arguments, found, lengths, plan, told, lines)
    elif arguments.seq_length is not None:
        raise DataError("no length is known: give --hf-tokenizer-path DIR, or --load DIR for rows with images.")
    return told, lines, lengths


def _counts(arguments: argparse.Namespace, found: Survey) -> dict[str, Any]:
    sums = {name: sum(getattr(found, name)) for name in ("turns", "images", "videos", "audios", "text_bytes")}
    bad = [{"path": place.path, "row": place.row, "reason": reason} for place, reason in found.bad]
    return {"paths": arguments.paths, "rows": found.rows, **sums, "bad": bad}


def _count_lines(arguments: argparse.Namespace, found: Survey, told: dict[str, Any]) -> list[str]:
    media = "".join(f", {told[name]} {name}" for name in ("images", "videos", "audios") if told[name])
    lines = [
        f"{', '.join(arguments.paths)}: {found.rows} rows, {told['turns']} turns{media}, "
        f"{told['text_bytes']} bytes of text, {len(found.bad)} rows that cannot be used"
    ]
    lines += [f"  {place}: {reason}" for place, reason in found.bad[:_NAMED]]
    if len(found.bad) > _NAMED:
        lines.append(f"  ... and {len(found.bad) - _NAMED} more; --json has all")
    if found.lengths and (unknown := len(found.turns) - len(found.lengths)):
        lines.append(f"{unknown} rows with media have no length: a model says what images become (--load DIR)")
    return lines


def _measured(
    arguments: argparse.Namespace,
    found: Survey,
    lengths: np.ndarray,
    plan: Plan | None,
    told: dict[str, Any],
    lines: list[str],
) -> None:
    """Add what lengths say."""
    from loongforge.data.tools.forecast import STEPS, evenness, filling, positions_of
    from loongforge.data.tools.lengths import Lengths

    numbers = Lengths.of(lengths)
    told["lengths"] = asdict(numbers)
    lines += numbers.lines("tokens")
    length = arguments.seq_length
    if length is None:
        return
    filled = filling(lengths, length)
    told["packing"] = asdict(filled)
    lines.append(
        f"--seq-length {length}: {filled.packed} packed sequences ({filled.bound} at least), {filled.filled:.1%} full; "
        f"unpacked {filled.unpacked}, {filled.filled_unpacked:.1%} full; {filled.overlong} rows are longer"
    )
    if not arguments.dp or not filled.packed:
        return
    fits = lengths <= length + 1
    costs, unit = _costs(found, lengths, plan)
    rows = evenness(positions_of(lengths, length), costs[fits], length, arguments.micro_batches, arguments.dp)
    told["balance"] = {"cost": unit, "steps": STEPS, "layouts": [asdict(row) for row in rows]}
    lines.append(f"busiest rank over the mean, cost in {unit}, {arguments.micro_batches} sequences of a rank and step:")
    lines.append(f"  {'dp':>5} {'as loaded':>10} {'balanced':>10} {'at least':>10}")
    lines += [f"  {row.dp:>5} {row.as_loaded:>10.3f} {row.balanced:>10.3f} {row.bound:>10.3f}" for row in rows]


def _costs(found: Survey, lengths: np.ndarray, plan: Plan | None) -> tuple[np.ndarray, str]:
    """Cost of each row, and its unit."""
    import numpy as np

    if plan is None:
        return lengths.astype(np.float64), "tokens"
    from loongforge.data.balance.cost import AnalyticCost

    model = AnalyticCost(plan)
    costs = model.foundation(lengths)
    if grids := [grid for row in found.grids for grid in row]:
        owner = np.repeat(np.arange(len(lengths)), [len(row) for row in found.grids])
        costs = costs + np.bincount(owner, model.encoder(grids), len(lengths))
    return costs, "FLOPs of the model"


def _plan(arguments: argparse.Namespace) -> Plan | None:
    """The plan of the model that is named, on one rank; None without one."""
    if not any(getattr(arguments, name) for name in _MODEL):
        return None
    from loongforge.core.config import resolve
    from loongforge.core.plan import Plan

    told = (*_MODEL, "seq_length", "hf_tokenizer_path", "chat_template", "messages_field", "text_field")
    given = [(f"--{name.replace('_', '-')}", getattr(arguments, name)) for name in told]
    words = [str(word) for flag, value in given if value is not None for word in (flag, value)]
    return Plan.of(resolve.resolve(["--train-iters", "1", *words, *arguments.rest]), 1)


def _rules(arguments: argparse.Namespace, plan: Plan | None) -> SurveyRules:
    """How rows are read: as the run of a plan would, or as far as a tokenizer goes."""
    from loongforge.data.conversations import ChatRules, chat_rules
    from loongforge.data.survey import ENDLESS, SurveyRules

    first = Path(arguments.paths[0])
    rules = SurveyRules(
        messages_field=arguments.messages_field or "messages",
        text_field=arguments.text_field or "text",
        folder=first if first.is_dir() else first.parent,
    )
    if plan is not None:
        from loongforge.core.data.ahead import request_ahead

        request = request_ahead(plan)
        chat = replace(chat_rules(request), overlong="drop", seq_length=ENDLESS)
        return replace(rules, chat=chat if request.tokenizer_path else None, processor=request.visual)
    if arguments.hf_tokenizer_path is None and arguments.tokenizer_type is None:
        return rules
    chat = ChatRules(
        choice=choice_of(arguments),
        template_file=arguments.chat_template,
        messages_field=rules.messages_field,
        train_on_prompt=False,
        overlong="drop",
        seq_length=ENDLESS,
    )
    return replace(rules, chat=chat)


def _shown(arguments: argparse.Namespace, path: Path, rules: SurveyRules) -> list[str]:
    """One conversation of a `.jsonl` or `.parquet` file as the model sees it."""
    from loongforge.data.survey import nth_row

    row = arguments.row or 1
    if rules.chat is None or rules.processor is not None or path.is_dir() or path.suffix == ".tar":
        if arguments.row is not None:
            raise DataError("--row shows conversations of text; give --hf-tokenizer-path DIR and no model that sees.")
        return []
    place, content, rows = nth_row(path, row)
    _require_row(row, rows)
    from loongforge.data.conversations import text_conversation
    from loongforge.data.rows import parse_row

    try:
        parsed = parse_row(content or b"")
        said = text_conversation(parsed, messages_field=rules.messages_field)
        finder = rules.chat.finder()
        text, spans = finder.spans(said.messages, said.tools)
        encoded = finder.encode(said.messages, said.tools)
    except ValueError as error:
        if arguments.row is None:  # not asked for; the survey names it
            return []
        raise DataError(f"{place}: {error}") from error
    for start, end in reversed(spans):
        text = f"{text[:start]}[[{text[start:end]}]]{text[end:]}"
    return [text, f"-- row {row}: {len(encoded.tokens)} tokens, {int(encoded.assistant.sum())} trained on"]


def _require_row(row: int, rows: int) -> None:
    if not 1 <= row <= rows:
        raise DataError(f"--row {row}: there are {rows}, counted from 1.")


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(word) if word.isdecimal() else 0 for word in text.split(","))
    if not all(numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: give numbers of ranks, such as 8,32,128")
    return numbers
