"""Conversations with images: every form of a row, every feature at its place, any order and any number of workers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from seeing_rows import asks, batches, pack, rows_of

from loongforge.data.tokenizer import HFTokenizer
from loongforge.data.vlm import open_vlm

SEQ = 128


@pytest.fixture
def tokenizer(seeing_tokenizer_dir) -> HFTokenizer:
    return HFTokenizer(seeing_tokenizer_dir)


def same(one: Any, other: Any) -> None:
    assert set(one) == set(other)
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def read(folder: Path, name: str) -> np.ndarray:
    with Image.open(folder / name) as image:
        return np.asarray(image.convert("RGB"))


def test_features_stand_where_the_image_was(pictures: Path, write_rows, request_for, tokenizer, processor) -> None:
    file = write_rows(pictures / "rows.jsonl", [asks("1.png", "3.png")])
    source = open_vlm(request_for(file, num_samples=1))
    sample = source[0]
    expected = [processor.image(read(pictures, name)).items[0] for name in ("1.png", "3.png")]
    counts = [item.features for item in expected]
    pads = "".join(f"<see>{'<pad>' * count}<seen>" for count in counts)
    text = f"<|im_start|>user\n{pads}what<|im_end|>\n<|im_start|>assistant\na forge<|im_end|>\n"
    tokens = tokenizer.encode(text)
    size = len(tokens) - 1
    assert sample["tokens"][:size].tolist() == tokens[:-1]
    assert sample["labels"][:size].tolist() == tokens[1:]
    pad = tokenizer.encode("<pad>")[0]
    assert sample["visual_positions"].tolist() == np.flatnonzero(sample["tokens"] == pad).tolist()
    assert sample["grid"].tolist() == [list(item.grid) for item in expected]
    np.testing.assert_array_equal(sample["pixels"], np.concatenate([item.patches for item in expected]))
    learned = [tokens[1:][place] for place in np.flatnonzero(sample["loss_mask"])]
    assert tokenizer.decode(learned) == "a forge<|im_end|>"
    starts = [int(sample["visual_positions"][0]), int(sample["visual_positions"][counts[0]])]
    assert sample["position_ids"].shape == (3, SEQ)
    assert sample["position_ids"][1, starts[1] : starts[1] + counts[1]].tolist() == [starts[1]] * counts[1]
    assert sample["position_ids"][2, -1] == 2


def forms(folder: Path) -> dict[str, dict[str, Any]]:
    """One conversation, said in the ways data sets say it."""
    text = "look <image>\nand <image> now"
    answer = {"role": "assistant", "content": "yes"}
    absolute = str(folder / "2.png")
    part = {"type": "text", "text": "look "}
    return {
        "placeholders": {"messages": [{"role": "user", "content": text}, answer], "images": ["0.png", "2.png"]},
        "llava": {
            "messages": [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}],
            "image": ["./0.png", absolute],
        },
        "parts": {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        part,
                        {"type": "image", "image": "0.png"},
                        {"type": "text", "text": "\nand "},
                        {"type": "image_url", "image_url": {"url": f"file://{absolute}"}},
                        {"type": "text", "text": " now"},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
            ]
        },
        "parts and a list": {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        part,
                        {"type": "image"},
                        {"type": "text", "text": "\nand "},
                        {"type": "image"},
                        {"type": "text", "text": " now"},
                    ],
                },
                answer,
            ],
            "images": ["0.png", "2.png"],
        },
    }


def test_all_forms_of_a_row_are_one(pictures: Path, write_rows, request_for) -> None:
    ways = forms(pictures)
    source = open_vlm(request_for(write_rows(pictures / "rows.jsonl", list(ways.values())), num_samples=len(ways)))
    assert len(source[0]["grid"]) == 2
    for number in range(1, len(ways)):
        same(source[0], source[number])


def shard_forms(folder: Path) -> dict[str, tuple[Any, dict[str, str]]]:
    """Layouts of shards: json, and the members by extension."""
    asked = [{"role": "user", "content": "<image>what"}, {"role": "assistant", "content": "a forge"}]
    return {
        "image_0": ({"texts": asked, "media": "image", "name": ["0_1.png"]}, {"0_1.png": "1.png"}),
        "vqa": ([{"content": "what"}, {"content": "a forge"}], {"jpg": "1.png"}),
        "vqa_marked": ([{"content": "<image>what"}, {"content": "a forge"}], {"png": "1.png"}),
        "llava": ({"messages": [{"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "a forge"}]},
                  {"png": "1.png"}),
        "named": ({"messages": asked, "images": ["named.left.png"]}, {"left.png": "1.png"}),
    }  # fmt: skip


def test_all_layouts_of_shards_are_one(pictures: Path, write_rows, request_for) -> None:
    ways = shard_forms(pictures)
    expected = open_vlm(request_for(write_rows(pictures / "rows.jsonl", [asks("1.png")]), num_samples=1))[0]
    source = open_vlm(request_for(pack(pictures, ways), num_samples=len(ways)))
    assert source.report()["images"] == len(ways)
    for number in range(len(ways)):
        same(expected, source[number])


def test_captions_and_text_alone(pictures: Path, request_for, tokenizer) -> None:
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    samples = {
        "caption": ({"captions": [{"content": "a forge"}]}, {"png": "0.png"}),
        "text_0": ({"texts": said, "media": "text", "name": []}, {}),
    }
    source = open_vlm(request_for(pack(pictures, samples), num_samples=2))
    assert "<seen><|im_end|>" in tokenizer.decode(source[0]["tokens"].tolist())
    assert source[1]["grid"].shape == (0, 3)
    assert source[1]["visual_positions"].shape == (0,)
    assert "pixels" not in source[1]


def test_videos_become_frames_with_text_between(pictures: Path, write_rows, request_for, tokenizer, processor) -> None:
    row = {
        "messages": [{"role": "user", "content": "<video> then <image>"}, {"role": "assistant", "content": "yes"}],
        "videos": ["clip.mp4"],
        "images": ["0.png"],
    }
    sample = open_vlm(request_for(write_rows(pictures / "rows.jsonl", [row]), num_samples=1))[0]
    text = tokenizer.decode(sample["tokens"].tolist())
    frame = "<frame>" * 8
    assert f"<see>at 0{frame}at 1{frame}at 2{frame}<seen> then <see><pad><pad><seen>" in text
    assert sample["grid"].tolist() == [[1, 4, 8]] * 3 + [[1, 2, 4]]
    assert sample["pixels"].shape == (3 * 32 + 8, 3)
    assert len(sample["visual_positions"]) == 3 * 8 + 2


@pytest.mark.parametrize("multiple", [1, 8])
def test_packed_conversations_keep_to_themselves(
    multiple: int, pictures: Path, write_rows, request_for, processor, tokenizer
) -> None:
    file = write_rows(pictures / "rows.jsonl", rows_of(24))
    source = open_vlm(request_for(file, packing=True, segment_multiple=multiple, shuffle=True, num_samples=400))
    alone = open_vlm(request_for(file, num_samples=24))
    expected = [alone[number] for number in range(24)]
    units = source.report()["sequences"]
    assert units < 24
    found = []
    for place in range(units):
        sample = source[place]
        borders = sample["cu_seqlens"]
        assert not (borders % multiple).any()
        assert borders[-1] == SEQ
        items = patches = 0
        for start, end in pairwise(borders):
            if not sample["loss_mask"][start:end].any():
                continue
            question = tokenizer.decode(sample["tokens"][start:end].tolist())
            number = next(n for n in range(24) if f"q{n}<" in question or f"q{n}\n" in question)
            one = expected[number]
            found.append(number)
            size = int(np.flatnonzero(one["loss_mask"])[-1]) + 1
            for name in ("tokens", "labels", "loss_mask"):
                np.testing.assert_array_equal(sample[name][start : start + size], one[name][:size])
            np.testing.assert_array_equal(
                sample["position_ids"][:, start : start + size], one["position_ids"][:, :size]
            )
            inside = (sample["visual_positions"] >= start) & (sample["visual_positions"] < end)
            np.testing.assert_array_equal(sample["visual_positions"][inside] - start, one["visual_positions"])
            count = len(one["grid"])
            np.testing.assert_array_equal(sample["grid"][items : items + count], one["grid"])
            if count:
                rows = len(one["pixels"])
                np.testing.assert_array_equal(sample["pixels"][patches : patches + rows], one["pixels"])
                patches += rows
            items += count
        assert items == len(sample["grid"])
    assert sorted(found) == list(range(24))


@pytest.mark.parametrize("packing", [False, True])
def test_order_does_not_depend_on_workers_restarts_or_process(
    packing: bool, pictures: Path, write_rows, request_for
) -> None:
    folder = pack(
        pictures, {f"k{n}": (row, {name: name for name in row["images"]}) for n, row in enumerate(rows_of(12))}
    )
    for path in (write_rows(pictures / "rows.jsonl", rows_of(12)), folder):
        request = request_for(path, packing=packing, shuffle=True, num_samples=12)
        whole = batches(open_vlm(request), 0)
        assert len(whole) == 6
        for again in (batches(open_vlm(request), 2), [*whole[:2], *batches(open_vlm(request), 2, start=4)]):
            for one, other in zip(whole, again, strict=True):
                same(one, other)


def test_shards_and_rows_say_the_same(pictures: Path, write_rows, request_for) -> None:
    rows = rows_of(8)
    folder = pack(pictures, {f"k{n}": (row, {name: name for name in row["images"]}) for n, row in enumerate(rows)})
    one = open_vlm(request_for(write_rows(pictures / "rows.jsonl", rows), num_samples=8))
    other = open_vlm(request_for(folder, num_samples=8))
    for place in (5, 0, 7, 2):
        same(one[place], other[place])
    assert {**one.fingerprint(), "data.0": ""} == {**other.fingerprint(), "data.0": ""}
    assert one.fingerprint()["data.0"] == other.fingerprint()["data.0"]


def test_sizes_are_enough_where_nothing_is_encoded(pictures: Path, write_rows, request_for) -> None:
    file = write_rows(pictures / "rows.jsonl", rows_of(6))
    seeing = [open_vlm(request_for(file, num_samples=6))[number] for number in range(6)]
    for name in pictures.glob("*.png"):
        whole = name.read_bytes()
        name.write_bytes(whole[: len(whole) // 2])  # the header is left; nobody may look further
    blind = open_vlm(request_for(file, num_samples=6, pixels=False))
    for number in range(6):
        seeing[number].pop("pixels", None)
        same(blind[number], seeing[number])


def test_long_conversations_keep_whole_images(pictures: Path, write_rows, request_for, tokenizer) -> None:
    row = asks("3.png", question="first", answer="kept")
    row["messages"] += [
        {"role": "user", "content": "<image>second"},
        {"role": "assistant", "content": "cut"},
    ]
    row["images"] += ["5.png"]
    file = write_rows(pictures / "rows.jsonl", [row, asks("5.png", "5.png"), asks("0.png")])
    source = open_vlm(request_for(file, seq_length=56, overlong="truncate", num_samples=3))
    report = source.report()
    assert (report["truncated"], report["dropped (too long)"], report["used"]) == (1, 1, 2)
    assert report["dropped_rows"] == [f"{file}:2: too long"]
    text = tokenizer.decode(source[0]["tokens"].tolist())
    assert "kept" in text
    assert "second" not in text
    assert len(source[0]["grid"]) == 1
    dropping = open_vlm(request_for(file, seq_length=56, overlong="drop", num_samples=3)).report()
    assert (dropping["dropped (too long)"], dropping["used"]) == (2, 1)


def test_split_conversations_keep_the_images_of_their_turns(pictures: Path, write_rows, request_for, tokenizer) -> None:
    row: dict[str, Any] = {"messages": [], "images": [f"{number}.png" for number in (3, 1, 5, 0)], "system": "forge"}
    for number in range(4):
        row["messages"] += asks("x", question=f"q{number}", answer=f"a{number}")["messages"]
    file = write_rows(pictures / "rows.jsonl", [row])
    source = open_vlm(request_for(file, seq_length=64, overlong="split", num_samples=9))
    report = source.report()
    assert (report["rows"], report["split"], report["images"]) == (1, 1, 4)
    assert 1 < report["used"] < 4
    single = write_rows(pictures / "each.jsonl", [asks(name) for name in row["images"]])
    grids = [open_vlm(request_for(single))[place]["grid"].tolist()[0] for place in range(4)]
    seen: list[int] = []
    for place in range(report["used"]):
        text = tokenizer.decode(source[place]["tokens"].tolist())
        assert text.startswith("<|im_start|>system\nforge<|im_end|>")
        turns = [number for number in range(4) if f"q{number}" in text]
        assert [f"a{number}" in text for number in turns] == [True] * len(turns)
        assert source[place]["grid"].tolist() == [grids[number] for number in turns]
        seen += turns
    assert seen == [0, 1, 2, 3]


def test_other_forms_show_images_too(pictures: Path, write_rows, request_for) -> None:
    said = asks("2.png", "0.png")
    asked, answered = (message["content"] for message in said["messages"])
    rows = [
        said,
        {"instruction": asked, "output": answered, "images": said["images"]},
        {
            "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answered}],
            "image": said["images"],
        },
    ]
    source = open_vlm(request_for(write_rows(pictures / "rows.jsonl", rows), num_samples=3))
    assert source.report()["formats"] == "alpaca 1, openai 1, sharegpt 1"
    for place in (1, 2):
        for key, value in source[0].items():
            np.testing.assert_array_equal(source[place][key], value)


def test_training_on_the_prompt_leaves_placeholders_out(pictures: Path, write_rows, request_for, tokenizer) -> None:
    file = write_rows(pictures / "rows.jsonl", [asks("2.png")])
    sample = open_vlm(request_for(file, train_on_prompt=True, num_samples=1))[0]
    pad = tokenizer.encode("<pad>")[0]
    size = int(np.flatnonzero(sample["loss_mask"])[-1]) + 1
    np.testing.assert_array_equal(sample["loss_mask"][:size], (sample["labels"][:size] != pad).astype(np.float32))
    assert sample["loss_mask"].sum() > 10


def test_a_tokenizer_without_marks_writes_zero_at_features(
    pictures: Path, write_rows, request_for, tokenizer_dir
) -> None:
    file = write_rows(pictures / "rows.jsonl", [asks("1.png", "0.png")])
    sample = open_vlm(request_for(file, tokenizer_path=str(tokenizer_dir), num_samples=1))[0]
    assert set(sample["tokens"][sample["visual_positions"]].tolist()) == {0}
    assert len(sample["visual_positions"]) == 6
    plain = HFTokenizer(tokenizer_dir)
    others = np.delete(sample["tokens"], sample["visual_positions"])
    assert int(others.max()) < plain.vocab_size
    assert plain.decode(others.tolist()).startswith("<|im_start|>user\nwhat<|im_end|>")


def test_one_row_of_positions_where_the_model_has_one(pictures: Path, write_rows, request_for, processor) -> None:
    file = write_rows(pictures / "rows.jsonl", [asks("1.png")])
    one = type(processor)(position_rank=1)
    sample = open_vlm(request_for(file, visual=one, position_rank=1, num_samples=1))[0]
    assert sample["position_ids"].tolist() == list(range(SEQ))


def test_the_processor_is_part_of_the_cache_and_a_photo_stands_upright(
    pictures: Path, write_rows, request_for, processor
) -> None:
    with Image.open(pictures / "photo.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # a quarter turn
        image.save(pictures / "turned.jpg", exif=exif)
    row = {**asks("turned.jpg"), "videos": ["clip.mp4"]}
    row["messages"][0]["content"] += "<video>"
    file = write_rows(pictures / "rows.jsonl", [row])
    grids = []
    for fps in (2.0, 1.0):
        source = open_vlm(request_for(file, visual=type(processor)(fps=fps), num_samples=1))
        grids.append(source[0]["grid"].tolist())
    assert [len(grid) for grid in grids] == [4, 3]
    assert grids[0][0] == [1, 6, 8]  # 32 high and 24 wide, turned
