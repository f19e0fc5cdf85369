"""One conversation in every form gives the tokens and the mask it has in OpenAI's; a row that fits none says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loongforge.core.errors import DataError
from loongforge.data.accounts import Answer
from loongforge.data.chat import open_chat
from loongforge.data.conversations import ChatEncoder, ChatRules
from loongforge.data.rows import Place
from loongforge.data.tokenise import TokenizerChoice
from loongforge.data.tokenizer import HFTokenizer
from loongforge.data.turns import Encoded

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"at": {}}}}]
ARGUMENTS = {"at": "数据", "times": 2}
CALL = {"type": "function", "function": {"name": "look", "arguments": ARGUMENTS}}
TEXT_CALL = {"type": "function", "function": {"name": "look", "arguments": json.dumps(ARGUMENTS)}}


def said(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in turns]


def spoken(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


TALK = said(("system", "Forge."), ("user", "a\nb"), ("assistant", "c"), ("user", "d\ne"), ("assistant", "f"))
ONCE = said(("user", "d"), ("assistant", "f"))
AGENT = [
    *said(("system", "Forge."), ("user", "a")),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    *said(("tool", "seen"), ("assistant", "f")),
]
PARTS = [{"type": "text", "text": "a\n"}, {"type": "text", "text": "b"}]
EQUAL: dict[str, tuple[list[dict[str, Any]], Any, dict[str, Any]]] = {
    "system column": (TALK, None, {"messages": TALK[1:], "system": "Forge."}),
    "parts": (TALK, None, {"messages": [TALK[0], {"role": "user", "content": PARTS}, *TALK[2:]]}),
    "openai under conversations": (TALK, None, {"conversations": TALK, "system": None, "tools": ""}),
    "sharegpt": (
        TALK,
        None,
        {
            "conversations": spoken(("human", "a\nb"), ("gpt", "c"), ("user", "d\ne"), ("assistant", "f")),
            "system": "Forge.",
        },
    ),
    "sharegpt with its system": (
        TALK,
        None,
        {"messages": spoken(("system", "Forge."), ("human", "a\nb"), ("gpt", "c"), ("human", "d\ne"), ("gpt", "f"))},
    ),
    "alpaca": (
        TALK,
        None,
        {"instruction": "d", "input": "e", "output": "f", "history": [["a\nb", "c"]], "system": "Forge."},
    ),
    "alpaca, no more": (
        ONCE,
        None,
        {"instruction": "d", "input": "", "output": "f", "history": None, "messages": None, "system": ""},
    ),
    "calls as text": (
        AGENT,
        TOOLS,
        {
            "messages": [*AGENT[:2], {"role": "assistant", "content": "", "tool_calls": [TEXT_CALL]}, *AGENT[3:]],
            "tools": json.dumps(TOOLS),
        },
    ),
    "sharegpt with calls": (
        AGENT,
        TOOLS,
        {
            "conversations": spoken(
                ("human", "a"),
                ("function_call", json.dumps({"name": "look", "arguments": ARGUMENTS})),
                ("observation", "seen"),
                ("gpt", "f"),
            ),
            "tools": TOOLS,
            "system": "Forge.",
        },
    ),
}


@pytest.fixture(scope="module")
def encode(tokenizer_dir: Path):
    """Rows to their answer, by the template shaped like Qwen3's."""
    template = Path(__file__).with_name("templates") / "thinks.jinja"

    def one(*rows: dict[str, Any], **changes: Any) -> Answer[Encoded]:
        rules: dict[str, Any] = {
            "choice": TokenizerChoice(path=str(tokenizer_dir), kind=None, vocab_size=512),
            "template_file": str(template),
            "messages_field": "messages",
            "train_on_prompt": False,
            "overlong": "error",
            "seq_length": 4096,
        }
        encoder = ChatEncoder(ChatRules(**{**rules, **changes}))
        lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
        return encoder([(Place("rows.jsonl", number), line) for number, line in enumerate(lines, start=1)])

    return one


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.parametrize("last_only", [False, True])
def test_every_form_is_the_same_conversation(name: str, last_only: bool, encode) -> None:
    messages, tools, row = EQUAL[name]
    answer = encode({"messages": messages, "tools": tools}, row, last_turn_only=last_only)
    assert answer.bad == []
    expected, found = answer.kept
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.assistant, expected.assistant)
    assert 0 < expected.assistant.sum() < len(expected.tokens)


def test_tools_and_system_are_really_written(encode, tokenizer_dir: Path) -> None:
    """Equal is not enough: both could have lost them."""
    (found,) = encode(EQUAL["sharegpt with calls"][2]).kept
    text = HFTokenizer(tokenizer_dir).decode(found.tokens.tolist())
    for part in ("Forge.", "<tools>", '{"name": "look", "arguments": {"at": "数据", "times": 2}}', "seen"):
        assert part in text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"question": "a", "answer": None}, "no field 'messages', 'conversations' or 'instruction'; there are"),
    "two": ({"messages": ONCE, "instruction": "a"}, "say which with --data-format"),
    "two systems": ({"messages": TALK, "system": "Me."}, "keep one of them"),
    "no answer": ({"instruction": "a"}, "no field 'output'"),
    "speaker": ({"conversations": spoken(("me", "a"))}, "from 'me'; known: human"),
    "mixed": ({"messages": [*ONCE, {"from": "human", "value": "a"}]}, "message 2 has 'from' and no 'role'"),
    "history": ({"instruction": "a", "output": "b", "history": [["a"]]}, "entry 0 of field 'history'"),
    "call": ({"conversations": spoken(("human", "a"), ("function_call", "look"))}, r"message 1 \(function_call\) is"),
    "nameless": ({"conversations": spoken(("human", "a"), ("function_call", "{}"))}, "must say the name"),
    "arguments": (
        {"messages": [ONCE[0], {"role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}]},
        "the arguments of the call of 'x' are not JSON",
    ),
    "tools": ({"messages": ONCE, "tools": "[x"}, "field 'tools' is not JSON"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ONCE[1]]}, "of type 'image'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_fits_none_says_why(name: str, encode) -> None:
    row, reason = REFUSED[name]
    answer = encode(row)
    assert answer.kept == []
    ((place, found),) = answer.bad
    assert str(place) == "rows.jsonl:1"
    assert re.search(reason, found), found


def test_a_format_can_be_forced_and_a_field_named(encode) -> None:
    both = {"messages": ONCE, "instruction": "d", "output": "f"}
    expected = encode({"messages": ONCE}).kept[0].tokens
    for form in ("openai", "alpaca"):
        (found,) = encode(both, data_format=form).kept
        np.testing.assert_array_equal(found.tokens, expected)
    (found,) = encode({"talk": spoken(("human", "d"), ("gpt", "f"))}, messages_field="talk").kept
    np.testing.assert_array_equal(found.tokens, expected)
    assert (
        "no field 'messages'; there are 'instruction', 'output'"
        in (encode({"instruction": "d", "output": "f"}, data_format="openai").bad[0][1])
    )
    assert "has no 'from'" in encode({"conversations": ONCE}, data_format="sharegpt").bad[0][1]


def test_forms_of_a_file_are_counted(make_request, write_rows, tokenizer_dir: Path, tmp_path: Path) -> None:
    """Each row says its own form, so that a file may hold several, and the report says how many of each."""
    rows = [{"messages": ONCE}, {"instruction": "d", "output": "f"}, {"messages": ONCE}]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    values: dict[str, Any] = {"paths": (str(file),), "tokenizer_path": str(tokenizer_dir), "seq_length": 64}
    source = open_chat(make_request(tmp_path / "cache", **values))
    assert source.report()["formats"] == "alpaca 1, openai 2"
    samples = [source[place]["tokens"].tolist() for place in range(3)]
    assert samples[0] == samples[1] == samples[2]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no field 'messages'"):
        open_chat(make_request(tmp_path / "cache", **values, data_format="openai"))


def test_template_arguments_and_masks_make_another_cache(
    make_request, write_rows, tokenizer_dir: Path, tmp_path: Path
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": TALK}])
    template = str(Path(__file__).with_name("templates") / "thinks.jinja")
    values: dict[str, Any] = {"paths": (str(file),), "tokenizer_path": str(tokenizer_dir), "seq_length": 96}
    values |= {"chat_template": template, "num_samples": 1}
    prints, samples = set(), []
    for changes in ({}, {"chat_template_kwargs": {"enable_thinking": False}}, {"history_mask_loss": True}):
        source = open_chat(make_request(tmp_path / "cache", **values, **changes))
        prints.add(tuple(sorted(source.fingerprint().items())))
        samples.append(source[0])
    assert len(prints) == 3
    plain, off, last = samples
    assert plain["tokens"].tolist() == off["tokens"].tolist(), "empty thoughts are written either way"
    learnt = [int(sample["loss_mask"].sum()) for sample in samples]
    assert learnt[1] < learnt[0]
    assert learnt[2] < learnt[0]
    assert ((plain["loss_mask"] == 1) | (last["loss_mask"] == 0)).all()
