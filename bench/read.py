"""Reading image + text samples up to the point where they are decoded, against plain webdataset.

    uv run python bench/read.py [--samples 4000] [--rounds 3]

Of every sample the JSON and the JPEG are read, in one process, from shards in the page cache. Checked first: all
readers deliver the same bytes. `cpu` is CPU seconds of the process, the least of the rounds, per sample; all sides
take turns.

- `index, any order`: samples by number from the offset index, in a random order;
- `vlm source, any order`: what the loader of `loongforge train` does for a sample before it decodes, which is reading
  its tokens, its mask and where its image stands from the cache, and the bytes of its image from the shard;
- `webdataset, in order`: `webdataset.WebDataset` over the same shards, no decode, no shuffle;
- `Parquet, in order`: the same bytes as two columns, through pyarrow a batch at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from loongforge.core.data.contract import Placed, SourceRequest, VisualItem
from loongforge.data.files import Files
from loongforge.data.index import ShardIndex, open_indices
from loongforge.data.shards import write_shards
from loongforge.data.visual_file import VisualFile
from loongforge.data.vlm import VisualConversations, open_vlm

Pair = tuple[bytes, bytes]
"""JSON and JPEG."""
WIDTH, HEIGHT, PER_SHARD = 640, 480, 1000
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"


class Flat:
    """An image is 64 features, whatever its size: what an image becomes is not measured here."""

    image_text, video_text, marks = "<image>", "<video>", ("<image>", "<video>")

    def __repr__(self) -> str:
        return "Flat()"

    def image_size(self, height: int, width: int) -> Placed:
        """64 features."""
        return Placed(pieces=(VisualItem(grid=(1, 16, 16), features=64, placeholder="<image>", patches=None),))


def make_samples(count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """A question to one JPEG each: shapes and noise, about 60 KB as photographs of this size are; 50 different ones."""
    generator = np.random.default_rng(0)
    pictures: list[bytes] = []
    for number in range(count):
        if number < 50:
            coarse = generator.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
            smooth = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
            noisy = smooth.astype(np.int16) + generator.integers(-12, 13, smooth.shape, dtype=np.int16)
            pictures.append(_jpeg(noisy.clip(0, 255).astype(np.uint8)))
        said = [
            {"role": "user", "content": f"<image>What is number {number}?"},
            {"role": "assistant", "content": "A forge. " * 20},
        ]
        yield f"s{number:06d}", {"json": json.dumps({"messages": said}).encode(), "jpg": pictures[number % 50]}


def _jpeg(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "jpeg", quality=85)
    return stream.getvalue()


def indexed(indices: list[ShardIndex], order: np.ndarray) -> Iterator[Pair]:
    """Samples in this order, by number."""
    files = Files()
    borders = np.cumsum([0, *map(len, indices)])
    shards = np.searchsorted(borders, order, side="right") - 1
    for shard, number in zip(shards.tolist(), (order - borders[shards]).tolist(), strict=True):
        sample = indices[shard][number]
        content = {member.extension: sample.read(member, files) for member in sample.members}
        yield content["json"], content["jpg"]


def sourced(conversations: VisualConversations, order: np.ndarray) -> Iterator[Pair]:
    """Tokens instead of the JSON; the bytes of the image."""
    for number in order.tolist():
        document = conversations.read(number)
        ((_, content),) = conversations.encoded(number)
        assert content is not None, "a member of a shard"
        yield document.tokens.tobytes(), content


def streamed(shards: list[Path]) -> Iterator[Pair]:
    """Through webdataset."""
    from webdataset import WebDataset  # pyright: ignore[reportAttributeAccessIssue]

    for sample in WebDataset([str(shard) for shard in shards], shardshuffle=False):
        yield sample["json"], sample["jpg"]


def columns(file: Path) -> Iterator[Pair]:
    """Through pyarrow."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file) as table:
        for batch in table.iter_batches(256, use_threads=False):
            for row in batch.to_pylist():
                yield row["json"], row["jpg"]


def write_columns(shards: list[Path], file: Path) -> None:
    """The samples of the shards as a Parquet file, uncompressed: a JPEG does not get smaller."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema([("json", pyarrow.binary()), ("jpg", pyarrow.binary())])
    with ParquetWriter(file, schema, compression="none") as writer:
        for shard in shards:
            rows = [{"json": text, "jpg": picture} for text, picture in streamed([shard])]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema), row_group_size=256)


def open_conversations(shards: list[Path], folder: Path) -> VisualConversations:
    """What the source of training reads from, over bytes as tokens."""
    backend = Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<image>", "<video>", "<eos>"])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<eos>", "pad_token": "<eos>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    visual: Any = Flat()
    open_vlm(
        SourceRequest(
            paths=(str(shards[0].parent),), split=None, part="train", seq_length=512, num_samples=1, seed=0,
            shuffle=False, packing=False, segment_multiple=1, vocab_size=259, tokenizer_path=str(folder),
            tokenizer_type=None, chat_template=None, cache=folder / "cache", text_field="text",
            messages_field="messages", train_on_prompt=False, overlong="error", loss_mask_eod=False, is_builder=True,
            visual=visual, barrier=lambda: None,
        )
    )  # fmt: skip
    (cache,) = (one for one in (folder / "cache").glob("shards-*") if one.is_dir())
    file = VisualFile(cache)
    return VisualConversations([file], 0, len(file))


def digest(pairs: Iterator[Pair], *, pictures: bool = False) -> str:
    """Of all bytes, whatever the order; of the pictures alone where the text has become tokens."""
    each = sorted(hashlib.sha256(b"\0".join(pair[pictures:])).digest() for pair in pairs)
    return hashlib.sha256(b"".join(each)).hexdigest()


def timed(read: Callable[[], Iterator[Pair]]) -> tuple[float, float]:
    """CPU seconds and seconds on the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    total = sum(len(text) + len(picture) for text, picture in read())
    assert total, "something was read"
    return time.process_time() - cpu, time.perf_counter() - clock


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shards = write_shards(make_samples(options.samples), folder / "shards", maxcount=PER_SHARD)
        began = time.process_time()
        indices = list(open_indices(shards, folder, workers=0))
        built = (time.process_time() - began) / options.samples
        conversations = open_conversations(shards, folder)
        write_columns(shards, folder / "table.parquet")
        order = np.random.default_rng(1).permutation(options.samples)
        readers: dict[str, Callable[[], Iterator[Pair]]] = {
            "index, any order": lambda: indexed(indices, order),
            "vlm source, any order": lambda: sourced(conversations, order),
            "webdataset, in order": lambda: streamed(shards),
            "Parquet, in order": lambda: columns(folder / "table.parquet"),
        }
        whole = {name: digest(read()) for name, read in readers.items() if not name.startswith("vlm")}
        assert len(set(whole.values())) == 1, whole
        seen = {digest(readers[name](), pictures=True) for name in readers}
        assert len(seen) == 1, "the images are the same too"
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
        for _ in range(options.rounds):
            for name, read in readers.items():
                taken[name].append(timed(read))
        size = sum(shard.stat().st_size for shard in shards) / options.samples
    print(f"{options.samples} samples of {size / 1000:.0f} KB; load average {os.getloadavg()[0]:.1f}")
    print(f"building the index: {built * 1e6:.0f} us a sample, once")
    print("| | cpu, us per sample | ratio | samples a second |\n|---|---|---|---|")
    base = min(cpu for cpu, _ in taken["webdataset, in order"])
    for name, found in taken.items():
        cpu, clock = min(cpu for cpu, _ in found), min(clock for _, clock in found)
        print(f"| {name} | {cpu / options.samples * 1e6:.0f} | {cpu / base:.2f} | {options.samples / clock:.0f} |")


if __name__ == "__main__":
    main()
