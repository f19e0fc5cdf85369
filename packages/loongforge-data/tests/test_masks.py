"""Templates in the shape of released ones: text, tokens and masks are those of transformers, derived ones too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from loongforge.core.errors import DataError
from loongforge.data.template import ChatTemplate, Message
from loongforge.data.tokenizer import HFTokenizer
from loongforge.data.turns import TurnFinder

SOURCES = {path.stem: path.read_text() for path in Path(__file__).with_name("templates").glob("*.jinja")}
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "look at <it> & say", "parameters": {"at": {}}}}
]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "数据", "times": 2}}}
TALK: list[Message] = [
    {"role": "system", "content": "You forge."},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "<think>\nfirst thought\n</think>\n\nfirst answer"},
    {"role": "user", "content": "how are you?"},
    {"role": "assistant", "content": "I am fine, 数据 \U0001f409 "},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "the last"},
]
AGENT: list[Message] = [
    *TALK[:4],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"seen": "a loong"}'},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "look again"},
    {"role": "tool", "content": "nothing"},
    {"role": "assistant", "content": "a loong, then nothing"},
]
CASES: list[tuple[str, list[Message], Any, dict[str, Any]]] = [
    (name, messages, tools, arguments)
    for name, several in (
        ("thinks", ({}, {"enable_thinking": True}, {"enable_thinking": False})),
        ("headers", ({}, {"date_string": "1 Jan 2026"})),
    )
    for arguments in several
    for messages, tools in ((TALK, None), (TALK[1:], None), (AGENT, TOOLS), (AGENT[:5], TOOLS), (TALK[:3], None))
]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> HFTokenizer:
    return HFTokenizer(tokenizer_dir)


@pytest.fixture(scope="module")
def reference(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(tokenizer_dir))


def finder(tokenizer: HFTokenizer, source: str, arguments: dict[str, Any], last_only: bool = False) -> TurnFinder:
    return TurnFinder(
        tokenizer, ChatTemplate(source, tokenizer.special_tokens, "tests", arguments), last_only=last_only
    )


def bare(source: str) -> str:
    """The same template without generation blocks, as it is released."""
    return re.sub(r"\{%- (end)?generation -%\}", "", source)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_masks_equal_transformers_with_and_without_blocks(number: int, tokenizer: HFTokenizer, reference) -> None:
    """transformers marks generation blocks; where a template has none, the derived mask must be the same."""
    name, messages, tools, arguments = CASES[number]
    options: Any = {"tools": tools, "truncation": False, **arguments}
    expected = reference.apply_chat_template(
        messages, chat_template=SOURCES[name], return_dict=True, return_assistant_tokens_mask=True, **options
    )
    plain = bare(SOURCES[name])
    assert "generation -%" not in plain
    assert reference.apply_chat_template(messages, chat_template=plain, tokenize=False, **options) == (
        finder(tokenizer, plain, arguments).text(messages, tools)
    )
    for source in (SOURCES[name], plain):
        encoded = finder(tokenizer, source, arguments).encode(messages, tools)
        assert encoded.tokens.tolist() == expected["input_ids"]
        assert encoded.assistant.astype(int).tolist() == expected["assistant_masks"]
        assert encoded.merged == 0
    turns = sum(message["role"] == "assistant" for message in messages)
    learnt = tokenizer.decode(np.array(expected["input_ids"])[np.array(expected["assistant_masks"]) == 1].tolist())
    assert learnt.count("<|im_end|>") + learnt.count("<|eot_id|>") == turns


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_last_turn_alone(number: int, tokenizer: HFTokenizer) -> None:
    """The mask is that of all turns from where the last one begins."""
    name, messages, tools, arguments = CASES[number]
    for source in (SOURCES[name], bare(SOURCES[name])):
        whole = finder(tokenizer, source, arguments).encode(messages, tools)
        last = finder(tokenizer, source, arguments, last_only=True).encode(messages, tools)
        np.testing.assert_array_equal(last.tokens, whole.tokens)
        runs = np.flatnonzero(np.diff(whole.assistant.astype(int), prepend=0) == 1)
        assert len(runs) == sum(message["role"] == "assistant" for message in messages)
        expected = whole.assistant & (np.arange(len(whole.tokens)) >= runs[-1])
        np.testing.assert_array_equal(last.assistant, expected)


def test_thinking_off_leaves_the_empty_thoughts_to_the_prompt(tokenizer: HFTokenizer) -> None:
    """They are what the model is asked with, so they are not learnt; thinking on, the model writes them itself."""
    empty = "<think>\n\n</think>\n\n"
    for arguments, answer in (({"enable_thinking": False}, "the last"), ({}, f"{empty}the last")):
        text, spans = finder(tokenizer, bare(SOURCES["thinks"]), arguments).spans(TALK)
        assert text.count(empty) == 1
        assert [text[start:end] for start, end in spans] == [
            "first answer<|im_end|>",
            "I am fine, 数据 \U0001f409 <|im_end|>",
            f"{answer}<|im_end|>",
        ]


def test_a_name_that_the_template_does_not_read_is_refused(tokenizer: HFTokenizer) -> None:
    with pytest.raises(DataError, match=r"reads no 'enable_thinkin', .* it reads enable_thinking"):
        finder(tokenizer, SOURCES["thinks"], {"enable_thinkin": False})
    with pytest.raises(DataError, match="it reads date_string"):
        finder(tokenizer, SOURCES["headers"], {"enable_thinking": False})
    with pytest.raises(DataError, match="it reads none"):
        finder(tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}", {"x": 1})


def test_blocks_that_are_not_one_for_a_turn_have_no_last_turn(tokenizer: HFTokenizer) -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match="7 generation blocks for 3 assistant turns"):
        finder(tokenizer, source, {}, last_only=True).encode(TALK)


def test_a_template_whose_turns_begin_unlike_its_prompt_is_refused(tokenizer: HFTokenizer) -> None:
    """Where an earlier turn begins otherwise than it is asked for, no header is guessed from what they share."""
    source = bare(SOURCES["thinks"]).replace(
        "{{- '<|im_start|>assistant\\n' -}}\n        {%- set", "{{- '<|im_start|>as:' -}}{%- set"
    )
    assert source != bare(SOURCES["thinks"])
    with pytest.raises(ValueError, match="no turn header of its own"):
        finder(tokenizer, source, {}).encode(TALK)
