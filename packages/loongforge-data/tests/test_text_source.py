"""Pre-training samples: the order is exact, complete and independent of how long the run is."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from loongforge.core.errors import DataError
from loongforge.data.blend import PERIOD, Blend, parse_paths, split_range
from loongforge.data.documents import write_documents
from loongforge.data.engine import Local
from loongforge.data.indexed import IndexedFile, token_type, write_index
from loongforge.data.parts import TextRules
from loongforge.data.permute import Permutation
from loongforge.data.text import open_text
from loongforge.data.tokenise import TokenizerChoice

VOCAB = 512


def write_pair(prefix: Path, documents: list[list[int]]) -> str:
    kind = token_type(VOCAB)
    np.concatenate(documents).astype(kind).tofile(f"{prefix}.bin")
    write_index(Path(f"{prefix}.idx"), np.array([len(one) for one in documents]), kind)
    return str(prefix)


@pytest.fixture
def documents() -> list[list[int]]:
    """Documents of very different lengths; every token of the corpus is another number, so order can be read off."""
    generator = np.random.default_rng(0)
    borders = np.concatenate([[0], np.sort(generator.choice(np.arange(1, 400), 99, replace=False)), [400]])
    return [list(range(start, end)) for start, end in pairwise(borders.tolist())]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 65, 1000])
def test_permutation_is_a_bijection_and_depends_on_its_key(size: int) -> None:
    images = [Permutation(size, key)(np.arange(size)) for key in (1, 2)]
    for image in images:
        assert sorted(image.tolist()) == list(range(size))
    if size >= 64:
        assert (images[0] != images[1]).mean() > 0.9
        assert abs(np.corrcoef(images[0], np.arange(size))[0, 1]) < 0.4


def test_permutation_is_the_same_for_ever() -> None:
    """A resumed run repeats it, so these numbers may never change."""
    assert Permutation(10, 42)(np.arange(10)).tolist() == [1, 2, 4, 3, 7, 0, 5, 9, 6, 8]


def test_every_token_is_an_input_once_per_epoch(documents, make_request, tmp_path: Path) -> None:
    """400 tokens in windows of 16: 25 windows are an epoch; documents stay whole and are shuffled."""
    prefix = write_pair(tmp_path / "corpus", documents)
    source = open_text(make_request(tmp_path, paths=(prefix,), num_samples=75))
    orders = []
    for epoch in range(3):
        samples = [source[epoch * 25 + place] for place in range(25)]
        inputs = np.concatenate([sample["tokens"] for sample in samples])
        assert sorted(inputs.tolist()) == list(range(400))
        orders.append(inputs.tolist())
        inside = np.concatenate([sample["labels"] == sample["tokens"] + 1 for sample in samples])
        # Every token is followed by its successor, except where a document ends (or follows by chance).
        assert 400 - 100 <= inside.sum() <= 400 - 90
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("seq_length", [7, 16, 41, 401])
def test_epochs_whose_length_is_no_multiple_join_without_loss(
    seq_length: int, documents, make_request, tmp_path: Path
) -> None:
    """The stream of all epochs has no gap: N windows hold every token equally often, up to one."""
    prefix = write_pair(tmp_path / "corpus", documents)
    source = open_text(make_request(tmp_path, paths=(prefix,), seq_length=seq_length, vocab_size=VOCAB))
    windows = 400  # exactly seq_length epochs
    counts = Counter(np.concatenate([source[place]["tokens"] for place in range(windows)]).tolist())
    assert set(counts.values()) == {seq_length}


def test_unshuffled_is_the_file_in_order(documents, make_request, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "corpus", documents)
    source = open_text(make_request(tmp_path, paths=(prefix,), shuffle=False))
    stream = np.concatenate([source[place]["tokens"] for place in range(30)])
    assert stream.tolist() == [token % 400 for token in range(480)]
    np.testing.assert_array_equal(source[3]["position_ids"], np.arange(16))
    assert source[3]["tokens"].dtype == np.int64
    assert source[3]["loss_mask"].dtype == np.float32


def test_a_longer_run_begins_as_the_shorter_one(documents, make_request, tmp_path: Path) -> None:
    first = write_pair(tmp_path / "first", documents)
    second = write_pair(tmp_path / "second", documents[:20])
    paths = ("0.7", first, "0.3", second)
    short = open_text(make_request(tmp_path, paths=paths, num_samples=40))
    long = open_text(make_request(tmp_path, paths=paths, num_samples=4000))
    assert len(short) == 40
    for place in range(40):
        np.testing.assert_array_equal(short[place]["tokens"], long[place]["tokens"])
    assert short.fingerprint() == long.fingerprint()


def test_access_in_any_order_gives_the_same_samples(documents, make_request, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "corpus", documents)
    forward, jumping = (open_text(make_request(tmp_path, paths=(prefix,))) for _ in range(2))
    expected = [forward[place]["tokens"] for place in range(60)]
    for place in np.random.default_rng(1).permutation(60):
        np.testing.assert_array_equal(jumping[int(place)]["tokens"], expected[place])


def test_split_divides_documents_without_overlap(documents, make_request, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "corpus", documents)
    seen = {}
    for part in ("train", "valid", "test"):
        source = open_text(make_request(tmp_path, paths=(prefix,), split="80,15,5", part=part))
        count = source.report()["tokens"]
        seen[part] = set(np.concatenate([source[place]["tokens"] for place in range(count)]).tolist())
        assert len(seen[part]) == count
    assert sum(len(tokens) for tokens in seen.values()) == 400
    assert not seen["train"] & seen["valid"]
    assert split_range("80,15,5", "valid", 100) == (80, 95)
    with pytest.raises(DataError, match=r"no document for valid out of 3.*--valid-data-path"):
        split_range("969,30,1", "valid", 3)
    with pytest.raises(DataError, match="three shares"):
        split_range("a,b", "train", 3)


def test_blend_keeps_its_shares_in_every_stretch() -> None:
    weights = [0.5, 0.3, 0.15, 0.05]
    blend = Blend(weights)
    drawn = [blend[place] for place in range(4000)]
    owners = np.array([owner for owner, _ in drawn])
    for start in (0, 1000, 3000):
        shares = np.bincount(owners[start : start + 1000], minlength=4) / 1000
        np.testing.assert_allclose(shares, weights, atol=0.004)
    for owner in range(4):  # each corpus is walked in order without a gap, also over the end of the pattern
        assert [rank for which, rank in drawn if which == owner] == list(range(int((owners == owner).sum())))
    before, after = [blend[place] for place in range(PERIOD)], [blend[place] for place in range(PERIOD, PERIOD + 100)]
    taken = Counter(owner for owner, _ in before)
    assert dict(reversed(after)) == {owner: taken[owner] for owner in range(4)}


def test_tiny_weights_still_get_their_turn() -> None:
    owners = [Blend([1e-9, 1.0, 1e-9])[place][0] for place in (0, PERIOD // 2 - 1, PERIOD // 2, PERIOD - 1)]
    assert {0, 1} <= set(owners) or {2, 1} <= set(owners)


@pytest.mark.parametrize(
    "paths", [(), ("0.3", "a", "b"), ("a", "0.3"), ("0.3", "a", "0.7"), ("-1", "a"), ("1", "2"), ("1e-1", "a", "b")]
)
def test_malformed_blends_are_refused(paths: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="--data-path"):
        parse_paths(paths)


def test_jsonl_is_tokenised_once_and_rows_keep_their_text(
    make_request, tokenizer_dir, tmp_path: Path, write_rows
) -> None:
    texts = ["hello world", "the loong forges 数据", "naïve café"]
    file = write_rows(tmp_path / "corpus.jsonl", [{"text": text, "id": 1} for text in texts])
    request = make_request(tmp_path / "cache", paths=(str(file),), tokenizer_path=str(tokenizer_dir), shuffle=False)
    source = open_text(request)
    pairs = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.idx")}
    assert len(pairs) == 1
    total = source.report()["tokens"]
    stream = np.concatenate([source[place]["tokens"] for place in range(-(-total // 16))])[:total].tolist()
    from loongforge.data.tokenizer import HFTokenizer

    tokenizer = HFTokenizer(tokenizer_dir)
    assert tokenizer.decode(stream) == "".join(text + "<|im_end|>" for text in texts)
    assert stream.count(tokenizer.eos_id) == 3
    open_text(request)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.idx")} == pairs
    assert not list((tmp_path / "cache").glob("*writing*"))


def test_end_token_gives_no_loss_when_asked(make_request, tokenizer_dir, tmp_path: Path, write_rows) -> None:
    file = write_rows(tmp_path / "corpus.jsonl", [{"text": "hello world"}] * 30)
    request = make_request(
        tmp_path, paths=(str(file),), tokenizer_path=str(tokenizer_dir), loss_mask_eod=True, num_samples=8
    )
    sample = open_text(request)[0]
    ends = sample["tokens"] == 2
    assert ends.any()
    np.testing.assert_array_equal(sample["loss_mask"] == 0, ends)


def test_text_file_is_one_document(make_request, tokenizer_dir, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("one paragraph\n\nanother paragraph\n" * 5)
    request = make_request(tmp_path, paths=(str(tmp_path / "book.txt"),), tokenizer_path=str(tokenizer_dir))
    assert open_text(request).report()["documents"] == 1


def test_bad_rows_are_named_all_at_once(make_request, tokenizer_dir, tmp_path: Path) -> None:
    rows = ['{"text": "fine"}', "{broken", '{"body": "x"}', "", '{"text": ""}', '{"text": 5}', "[1]", "[2]"]
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(rows))
    request = make_request(tmp_path / "cache", paths=(str(file),), tokenizer_path=str(tokenizer_dir))
    with pytest.raises(DataError) as error:
        open_text(request)
    lines = str(error.value).splitlines()
    for number in (2, 3, 4, 5, 6):
        assert any(line.startswith(f"{file}:{number}:") for line in lines), number
    assert "there are 'body' (--text-field chooses)" in str(error.value)
    assert lines[-1] == "Stopped after 5 bad rows."
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--hf-tokenizer-path"),
        ({"tokenizer_path": "nowhere"}, r"no tokenizer.json in nowhere"),
        ({"vocab_size": 100, "tokenizer_path": "DIR"}, r"token ids up to \d+, the model's vocabulary ends at 99"),
    ],
)
def test_missing_or_foreign_tokenizers_are_refused(
    changes, message, make_request, tokenizer_dir, tmp_path: Path, write_rows
) -> None:
    file = write_rows(tmp_path / "corpus.jsonl", [{"text": "hello"}])
    changes = {name: str(tokenizer_dir) if value == "DIR" else value for name, value in changes.items()}
    with pytest.raises(DataError, match=message):
        open_text(make_request(tmp_path, paths=(str(file),), **changes))


def test_tokens_of_another_model_are_refused(documents, make_request, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "corpus", documents)
    source = open_text(make_request(tmp_path, paths=(prefix,), vocab_size=100))
    with pytest.raises(DataError, match=r"corpus.*outside the model's vocabulary of 100"):
        _ = [source[place] for place in range(25)]


@pytest.mark.parametrize("damage", ["short bin", "short idx", "no bin", "header", "lengths", "empty"])
def test_damaged_pairs_are_refused(damage: str, documents, make_request, tmp_path: Path) -> None:
    prefix = write_pair(tmp_path / "corpus", documents)
    index, tokens = tmp_path / "corpus.idx", tmp_path / "corpus.bin"
    IndexedFile(prefix)
    if damage == "short bin":
        os.truncate(tokens, tokens.stat().st_size - 2)
    elif damage == "short idx":
        os.truncate(index, index.stat().st_size - 8)
    elif damage == "no bin":
        tokens.unlink()
    elif damage == "header":
        index.write_bytes(b"X" + index.read_bytes()[1:])
    elif damage == "lengths":
        content = bytearray(index.read_bytes())
        struct.pack_into("<i", content, 34, 10_000)
        index.write_bytes(bytes(content))
    else:
        index.write_bytes(b"")
    with pytest.raises(DataError, match=r"corpus\.(idx|bin)"):
        open_text(make_request(tmp_path, paths=(prefix,)))


@pytest.mark.parametrize("vocab", [65499, 65500])
@pytest.mark.filterwarnings("ignore")  # megatron-core warns of its own imports and of a rank it does not need
def test_pairs_are_those_of_megatron_core(vocab: int, make_request, tmp_path: Path) -> None:
    """Same bytes as its builder writes, and its reader gives the documents back."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    written = [[5, 6, 7], [65000], list(range(300))]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocab))
    for tokens in written:
        builder.add_document(torch.tensor(tokens), [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    rows = [json.dumps({"text": " ".join(map(str, one))}) for one in written]
    (tmp_path / "ours.jsonl").write_text("\n".join(rows))
    rules = TextRules(choice=TokenizerChoice(path=None, kind="NullTokenizer", vocab_size=vocab))
    write_documents([tmp_path / "ours.jsonl"], [str(tmp_path / "ours")], rules, Local())
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert [np.asarray(read.get(number)).tolist() for number in range(3)] == written

    # A document may be several sequences (sentences) there: it is read whole here.
    builder = IndexedDatasetBuilder(str(tmp_path / "many.bin"), dtype=np.int32)
    builder.add_document(torch.arange(10), [3, 7])
    builder.add_document(torch.arange(10, 20), [10])
    builder.finalize(str(tmp_path / "many.idx"))
    source = open_text(make_request(tmp_path, paths=(str(tmp_path / "many"),), seq_length=5, shuffle=False))
    assert source.report()["documents"] == 2
    assert np.concatenate([source[place]["tokens"] for place in range(4)]).tolist() == list(range(20))


def test_fingerprint_knows_the_content(documents, make_request, tmp_path: Path) -> None:
    facts = []
    for name, content in (("a", documents), ("b", documents), ("c", [*documents[:-1], [1] * len(documents[-1])])):
        facts.append(open_text(make_request(tmp_path, paths=(write_pair(tmp_path / name, content),))).fingerprint())
    assert facts[0] == facts[1], "a moved file is the same data"
    assert facts[0] != facts[2]
    assert json.loads(json.dumps(dict(facts[0]))) == facts[0]
