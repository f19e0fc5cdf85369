"""Fine-tuning samples: every conversation once per epoch, never mixed, and every row accounted for."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loongforge.core.data.quarantine import Accounted, Bad
from loongforge.core.errors import DataError
from loongforge.data.accounts import Accounts, Answer
from loongforge.data.chat import ChatSource, open_chat
from loongforge.data.rows import Place
from loongforge.data.tokenizer import HFTokenizer

SEQ = 64


def conversation(number: int) -> dict[str, Any]:
    """One that can be told from every other: its number is its question; its length varies."""
    answer = " ".join(["forge"] * (1 + number * 7 % 12))
    return {"messages": [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def file(tmp_path: Path, write_rows) -> Path:
    return write_rows(tmp_path / "chats.jsonl", [conversation(number) for number in range(50)])


@pytest.fixture
def request_for(make_request, tokenizer_dir, tmp_path: Path):
    def build(file: Path, **changes: Any):
        values = {"paths": (str(file),), "tokenizer_path": str(tokenizer_dir), "seq_length": SEQ, "packing": True}
        return make_request(tmp_path / "cache", **{**values, **changes})

    return build


def segments(sample: Any) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tokens, labels and loss mask of each segment."""
    pieces = pairwise(sample["cu_seqlens"])
    return [(sample["tokens"][a:b], sample["labels"][a:b], sample["loss_mask"][a:b]) for a, b in pieces]


def questions(source: ChatSource, places: range, tokenizer: HFTokenizer) -> Counter[str]:
    found: Counter[str] = Counter()
    for place in places:
        for tokens, _, mask in segments(source[place]):
            if mask.any():
                text = tokenizer.decode(tokens.tolist())
                assert text.count("<|im_start|>user") == 1, f"two conversations in one segment: {text!r}"
                found[text.split("user\n")[1].split("<|im_end|>")[0]] += 1
    return found


@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_every_conversation_once_per_epoch_in_its_own_segment(
    multiple: int, file: Path, request_for, tokenizer_dir
) -> None:
    source = open_chat(request_for(file, segment_multiple=multiple))
    tokenizer = HFTokenizer(tokenizer_dir)
    packs = source.report()["sequences"]
    assert packs < 50
    expected = Counter(f"q{number}" for number in range(50))
    orders = []
    for epoch in range(2):
        places = range(epoch * packs, (epoch + 1) * packs)
        assert questions(source, places, tokenizer) == expected
        orders.append([source[place]["tokens"].tolist() for place in places])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    for place in range(packs):
        sample = source[place]
        borders = sample.get("cu_seqlens")
        assert borders is not None
        assert borders.dtype == np.int32
        assert borders[0] == 0
        assert borders[-1] == SEQ
        assert (np.diff(borders) > 0).all()
        assert not (borders % multiple).any()
        for start, end in pairwise(borders):
            np.testing.assert_array_equal(sample["position_ids"][start:end], np.arange(end - start))


def test_labels_are_the_next_tokens_and_only_answers_count(file: Path, request_for, tokenizer_dir) -> None:
    tokenizer = HFTokenizer(tokenizer_dir)
    source = open_chat(request_for(file, segment_multiple=4))
    for tokens, labels, mask in segments(source[0]):
        if not mask.any():
            assert (tokens == tokenizer.pad_id).all()
            continue
        real = int(np.flatnonzero(mask)[-1]) + 1
        np.testing.assert_array_equal(labels[: real - 1], tokens[1:real])
        learnt = tokenizer.decode(labels[mask == 1].tolist())
        assert learnt.startswith("forge")
        assert learnt.endswith("<|im_end|>")
        assert learnt.count("<|im_end|>") == 1
        assert tokenizer.decode([int(tokens[np.flatnonzero(mask)[0]])]) == "\n", (
            "the header's newline predicts the answer"
        )


def test_unpacked_samples_hold_one_conversation(file: Path, request_for, tokenizer_dir) -> None:
    tokenizer = HFTokenizer(tokenizer_dir)
    source = open_chat(request_for(file, packing=False, split="80,20,0", part="train"))
    seen = Counter()
    for place in range(40):
        sample = source[place]
        assert "cu_seqlens" not in sample
        np.testing.assert_array_equal(sample["position_ids"], np.arange(SEQ))
        seen[tokenizer.decode(sample["tokens"].tolist()).split("user\n")[1].split("<|im_end|>")[0]] += 1
    assert seen == Counter(f"q{number}" for number in range(40))


def test_a_longer_run_begins_as_the_shorter_one_and_any_access_order(file: Path, request_for) -> None:
    short, long = open_chat(request_for(file)), open_chat(request_for(file, num_samples=10_000))
    for place in np.random.default_rng(0).permutation(60):
        for name in ("tokens", "labels", "loss_mask", "cu_seqlens", "position_ids"):
            np.testing.assert_array_equal(dict(short[int(place)])[name], dict(long[int(place)])[name])
    assert short.fingerprint() == long.fingerprint()
    other = open_chat(request_for(file, seed=8))
    assert other.fingerprint() != short.fingerprint()
    assert any((other[place]["tokens"] != short[place]["tokens"]).any() for place in range(20))


def test_trained_on_everything_when_asked(file: Path, request_for, templates, tmp_path: Path, tokenizer_dir) -> None:
    """The template may even hide the assistant's turns then."""
    template = tmp_path / "odd.jinja"
    template.write_text("{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}")
    source = open_chat(request_for(file, train_on_prompt=True, chat_template=str(template)))
    tokens, labels, mask = segments(source[0])[0]
    text = HFTokenizer(tokenizer_dir).decode([*tokens.tolist(), int(labels[-1])])
    assert mask.all()
    assert text.startswith("Q")
    assert text.count("<|im_end|>") == 2
    with pytest.raises(DataError, match=r"chats.jsonl:1: .*--chat-template"):
        open_chat(request_for(file, chat_template=str(template)))


def long_rows() -> list[dict[str, Any]]:
    turn = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "forge " * 8}]
    hopeless = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "forge " * 200}]
    silent = [{"role": "user", "content": "nobody answers"}]
    return [{"messages": turn * 9}, {"messages": hopeless}, {"messages": turn}, {"messages": silent}]


def test_overlong_conversations_lose_whole_turns_only(request_for, write_rows, tmp_path: Path, tokenizer_dir) -> None:
    file = write_rows(tmp_path / "long.jsonl", long_rows())
    report = open_chat(request_for(file)).report()
    assert report["rows"] == 4
    assert report["truncated"] == 1
    assert report["dropped (too long)"] == 1
    assert report["dropped (no token to learn)"] == 1
    assert report["used"] == 2
    named = " ".join(report["dropped_rows"])
    assert f"{file}:2: too long" in named
    assert f"{file}:4: no token to learn" in named
    source = open_chat(request_for(file, packing=False, shuffle=False))
    tokenizer = HFTokenizer(tokenizer_dir)
    cut, whole = source[0], source[1]
    one_turn = int(whole["loss_mask"].sum())
    assert int(cut["loss_mask"].sum()) % one_turn == 0
    assert one_turn < int(cut["loss_mask"].sum()) < 9 * one_turn
    assert tokenizer.decode(cut["labels"][cut["loss_mask"] == 1].tolist()).endswith("<|im_end|>")


def test_overlong_policies(request_for, write_rows, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "long.jsonl", long_rows())
    report = open_chat(request_for(file, overlong="drop")).report()
    assert report["dropped (too long)"] == 2
    assert report["truncated"] == 0
    with pytest.raises(DataError, match=rf"long.jsonl:1: \d+ tokens, --seq-length {SEQ} holds {SEQ + 1}"):
        open_chat(request_for(file, overlong="error"))
    with pytest.raises(DataError, match=r"none of 1 conversations can be used: .*none\.jsonl:1: no token to learn"):
        open_chat(request_for(write_rows(tmp_path / "none.jsonl", long_rows()[3:])))


def test_images_are_not_left_out_in_silence(request_for, write_rows, tmp_path: Path) -> None:
    said = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    file = write_rows(
        tmp_path / "rows.jsonl", [{"messages": said, "images": []}, {"messages": said, "images": ["a.png"]}]
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:2: it lists images, and the source 'chat' reads text alone"):
        open_chat(request_for(file))


def test_bad_rows_are_named(request_for, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    rows = [
        '{"messages": []}',
        '{"conversations": [1]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"content": "x"}]}',
        '{"messages": [{"role": "assistant", "content": "x"}]}',
    ]
    file.write_text("\n".join(rows))
    with pytest.raises(DataError) as error:
        open_chat(request_for(file))
    text = str(error.value)
    for number, reason in enumerate(
        ("not empty", "message 0 is int", "neither content nor tool_calls", "no role", "begins with an assistant"),
        start=1,
    ):
        line = next(line for line in text.splitlines() if line.startswith(f"{file}:{number}:"))
        assert reason in line


def test_parts_do_not_overlap_and_weights_hold(file: Path, request_for, write_rows, tmp_path, tokenizer_dir) -> None:
    tokenizer = HFTokenizer(tokenizer_dir)
    parts = []
    for part in ("train", "valid"):
        source = open_chat(request_for(file, split="90,10", part=part))
        parts.append(set(questions(source, range(source.report()["sequences"]), tokenizer)))
    assert len(parts[0]) == 45
    assert len(parts[1]) == 5
    assert not parts[0] & parts[1]
    other = write_rows(tmp_path / "other.jsonl", [conversation(number) for number in range(100, 120)])
    blended = open_chat(request_for(file, paths=("3", str(file), "1", str(other)), packing=False))
    drawn = [tokenizer.decode(blended[place]["tokens"].tolist()).split("user\n")[1] for place in range(400)]
    assert sum(text.startswith(("q10", "q11")) and not text.startswith(("q10<", "q11<")) for text in drawn) == 100


def test_cache_is_reused_and_damage_is_said(file: Path, request_for, tmp_path: Path) -> None:
    open_chat(request_for(file))
    folders = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir() if path.is_dir()}
    assert len(folders) == 1
    open_chat(request_for(file, seed=9))
    assert {path: path.stat().st_mtime_ns for path in folders} == folders
    folder = next(iter(folders))
    tokens = folder / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"damaged .* delete the folder"):
        open_chat(request_for(file))


def test_what_packing_and_tokenizer_need(file: Path, request_for, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="multiple of 48"):
        open_chat(request_for(file, segment_multiple=48))
    with pytest.raises(DataError, match="HFTokenizer"):
        open_chat(request_for(file, tokenizer_type="NullTokenizer"))
    with pytest.raises(DataError, match="--hf-tokenizer-path"):
        open_chat(request_for(file, tokenizer_path=None))
    with pytest.raises(DataError, match="no file"):
        open_chat(request_for(tmp_path / "absent.jsonl"))


def test_rows_that_cannot_be_used_are_named_and_the_others_trained(file: Path, request_for, tokenizer_dir) -> None:
    lines = file.read_text().splitlines()
    lines[3], lines[7], lines[20] = "{", "", '{"messages": 7}'
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"chats\.jsonl:8: an empty line(.|\n)*--max-bad-samples 2 allows no more"):
        open_chat(request_for(file, may_leave_out=2))
    source = open_chat(request_for(file, may_leave_out=3))
    assert isinstance(source, Accounted)
    assert sorted(bad.row for bad in source.left_out) == [4, 8, 21]
    assert source.conversations == 47
    report = source.report()
    assert (report["rows"], report["quarantined"], report["used"]) == (50, 3, 47)
    left = questions(source, range(len(source.packed[0].packs)), HFTokenizer(tokenizer_dir))
    assert left == Counter(f"q{number}" for number in range(50) if number not in (3, 7, 20))


def test_a_row_that_is_neither_kept_nor_named_is_an_error(tmp_path: Path) -> None:
    place = Place("rows.jsonl", 1)
    with Accounts(tmp_path) as accounts:
        list(accounts.planned(range(3)))
        accounts.add(Answer(rows=1, kept=["a"], places=[place]))
        accounts.add(Answer(rows=1, kept=["b"], places=[place], bad=[(place, "torn")]))
        bad = [Bad(file="rows.jsonl", row=3, reason="torn")]
        with pytest.raises(
            DataError, match="3 rows were read and 3 answered; they make 2 conversations, and 1 are kept"
        ):
            accounts.summary("rows.jsonl", 1, bad)
    with Accounts(tmp_path) as accounts:
        list(accounts.planned(range(4)))
        accounts.add(Answer(rows=3, kept=["a", "b", "c"], places=[place] * 3))
        with pytest.raises(DataError, match="4 rows were read and 3 answered"):
            accounts.summary("rows.jsonl", 3)
