"""What is too long is dropped, cut or split between turns, and every row of which that is true is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loongforge.data.chat import ChatSource, open_chat
from loongforge.data.tokenizer import HFTokenizer

SEQ = 64


def exchange(name: str, words: int = 6) -> list[dict[str, Any]]:
    return [{"role": "user", "content": name}, {"role": "assistant", "content": f"{name} " + "forge " * words}]


def agent(name: str) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": name, "arguments": {}}}
    return [
        {"role": "user", "content": name},
        {"role": "assistant", "content": f"{name} first", "tool_calls": [call]},
        {"role": "tool", "content": f"{name} seen"},
        {"role": "assistant", "content": f"{name} last"},
    ]


SYSTEM = {"role": "system", "content": "scale"}
HOPELESS = exchange("hopeless", 200)
ROWS: list[list[dict[str, Any]]] = [
    [SYSTEM, *(message for number in range(5) for message in exchange(f"q{number}"))],
    exchange("short"),
    HOPELESS,
    [*exchange("a"), *HOPELESS, *exchange("b")],
    [SYSTEM, {"role": "user", "content": "nobody answers"}],
    [SYSTEM, *agent("x"), *agent("y"), *agent("z")],
]


@pytest.fixture
def opened(make_request, write_rows, tokenizer_dir: Path, tmp_path: Path):
    def build(overlong: str, rows: list[list[dict[str, Any]]] = ROWS, **changes: Any) -> ChatSource:
        file = write_rows(tmp_path / "long.jsonl", [{"messages": row} for row in rows])
        values: dict[str, Any] = {"paths": (str(file),), "tokenizer_path": str(tokenizer_dir), "seq_length": SEQ}
        return open_chat(
            make_request(tmp_path / "cache", **{**values, "shuffle": False, "overlong": overlong, **changes})
        )

    return build


def texts(source: ChatSource, tokenizer: HFTokenizer) -> list[str]:
    """Every conversation of the data once, without its padding."""
    found: list[str] = []
    for place in range(source.report()["used"]):
        sample = source[place]
        end = int(np.flatnonzero(sample["loss_mask"])[-1])
        found.append(tokenizer.decode([*sample["tokens"][: end + 1].tolist(), int(sample["labels"][end])]))
    return found


def rendered(messages: list[dict[str, Any]]) -> str:
    """As the ChatML template of these tests writes them, up to the last end of a turn."""
    return "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in messages).rstrip("\n")


def notes(report: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for file in report.get("all_named_in", []) for line in Path(file).read_text().splitlines()]


def test_split_makes_samples_of_whole_exchanges(opened, tokenizer_dir: Path) -> None:
    """Each piece has the system's words; calls stay with their results; what never fits is named."""
    source = opened("split")
    tokenizer = HFTokenizer(tokenizer_dir)
    found = texts(source, tokenizer)
    assert all(len(tokenizer.encode(text)) <= SEQ + 1 for text in found)
    first = [text for text in found if "q" in text]
    body = rendered([SYSTEM])
    assert len(first) > 1
    assert all(text.startswith(body) for text in first)
    assert "".join(text.removeprefix(body) for text in first).replace("\n", "") == (
        rendered(ROWS[0]).removeprefix(body).replace("\n", "")
    )
    assert {rendered(exchange(name)) for name in ("short", "a", "b")} <= set(found)
    agents = [text for text in found if " first" in text]
    assert len(agents) > 1
    for text in agents:
        assert text.startswith(body)
        assert text.count(" first") == text.count(" seen") == text.count(" last")
    assert sum(text.count(" first") for text in agents) == 3
    report = source.report()
    assert (report["rows"], report["split"], report["truncated"]) == (6, 3, 0)
    assert (report["dropped (too long)"], report["dropped (no token to learn)"]) == (1, 1)
    assert report["conversations"] == report["used"] == len(found)
    told = {note["row"]: note for note in notes(report)}
    assert {row: (note["done"], note["rule"], note["lost_messages"]) for row, note in told.items()} == {
        1: ("split", "too long", 0),
        3: ("dropped", "too long", 2),
        4: ("split", "too long", 2),
        5: ("dropped", "no token to learn", 2),
        6: ("split", "too long", 0),
    }
    assert (told[4]["pieces"], told[6]["pieces"]) == (2, len(agents))
    assert all(note["tokens"] > SEQ + 1 for row, note in told.items() if row != 5)


@pytest.mark.parametrize(("overlong", "kept"), [("drop", 1), ("truncate", 4)])
def test_every_row_is_accounted_for(overlong: str, kept: int, opened) -> None:
    report = opened(overlong).report()
    assert (report["rows"], report["used"], report["split"]) == (6, kept, 0)
    dropped = sum(count for name, count in report.items() if name.startswith("dropped ("))
    assert report["used"] + dropped == report["rows"]
    told = notes(report)
    assert len(told) == dropped + report["truncated"] == 5
    assert sum(note["done"] == "truncated" for note in told) == report["truncated"] == kept - 1
    assert [note["row"] for note in told] == [1, 3, 4, 5, 6]


def test_all_are_named_and_a_report_names_five(opened, tmp_path: Path) -> None:
    rows = [HOPELESS] * 9 + [exchange("short")]
    report = opened("drop", rows).report()
    assert report["dropped_rows"] == [f"{tmp_path / 'long.jsonl'}:{row}: too long" for row in range(1, 6)]
    assert [note["row"] for note in notes(report)] == list(range(1, 10))
    clean = opened("drop", [exchange("short")]).report()
    assert "all_named_in" not in clean
    assert "dropped_rows" not in clean


def test_an_exchange_that_does_not_fit_alone_keeps_its_first_answers(opened, tokenizer_dir: Path) -> None:
    long = agent("w")
    long[-1]["content"] = "forge " * 200
    source = opened("split", [[SYSTEM, *long, *exchange("next")]])
    found = texts(source, HFTokenizer(tokenizer_dir))
    assert found == [rendered([SYSTEM, *long[:2]]), rendered([SYSTEM, *exchange("next")])]
    (note,) = notes(source.report())
    assert (note["pieces"], note["lost_messages"]) == (2, 2)


def test_the_last_turn_of_every_piece_counts(opened, tokenizer_dir: Path) -> None:
    source = opened("split", ROWS[:1], history_mask_loss=True)
    for place in range(source.report()["used"]):
        sample = source[place]
        learnt = HFTokenizer(tokenizer_dir).decode(sample["labels"][sample["loss_mask"] == 1].tolist())
        assert learnt.count("<|im_end|>") == 1
