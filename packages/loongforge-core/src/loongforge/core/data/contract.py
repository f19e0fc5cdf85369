"""What the trainer asks of data: samples by number, so that order, resume and rank count are exact.

A source answers `source[i]` for i = 0, 1, 2, ... in *training order*: shuffling, blending, packing and epochs are its
own affair and depend only on the seed and the data. The position of a run is therefore one number, the samples
consumed, whatever the number of ranks or loader workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from loongforge.core.config.run import DataConfig


class Sample(TypedDict):
    """One sequence of exactly `seq_length` positions, padded with loss_mask 0."""

    tokens: np.ndarray
    """int64 `[seq_length]`: input tokens."""
    labels: np.ndarray
    """int64 `[seq_length]`: the token each position must predict."""
    loss_mask: np.ndarray
    """float32 `[seq_length]`: 1 where the prediction counts."""
    position_ids: np.ndarray
    """int64 `[seq_length]`: position inside the own document; `[3, seq_length]` for time, height and width when the
    request asks for three rows."""
    cu_seqlens: NotRequired[np.ndarray]
    """int32 `[segments + 1]`, from 0 to seq_length; only in packed samples. Each segment attends to itself alone.

    Segment lengths are multiples of `SourceRequest.segment_multiple`; what pads a segment has loss_mask 0."""
    pixels: NotRequired[np.ndarray]
    """float32 `[patches, patch_dim]`: all items of the sample, one after the other. Absent in a sample of text alone,
    and wherever `SourceRequest.pixels` is false."""
    grid: NotRequired[np.ndarray]
    """int64 `[items, 3]`: (t, h, w) of each item in patches. With a visual request always there, `[0, 3]` without
    items."""
    visual_positions: NotRequired[np.ndarray]
    """int64 `[features]`: positions in the sequence that stand for features, in the order of the items, ascending; as
    many as the items' features, or the source has raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualItem:
    """One image, or one video or frame of a video, as the encoder takes it."""

    grid: tuple[int, int, int]
    """(t, h, w) in patches."""
    features: int
    """Tokens it becomes."""
    placeholder: str
    """Token text that stands for one of its features: `<|image_pad|>`."""
    patches: np.ndarray | None = None
    """float32 `[t * h * w, patch_dim]`; None where only the size was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A visual item among text: what is written before, between and after its features."""

    pieces: tuple[str | VisualItem, ...]
    """Text, and items where their features stand. A video may become several items with time stamps between them."""
    seconds_per_grid: float = 0.0
    """Seconds from one temporal step of the grid to the next; 0 for an image."""

    @property
    def items(self) -> tuple[VisualItem, ...]:
        """The pieces that are not text."""
        return tuple(piece for piece in self.pieces if isinstance(piece, VisualItem))


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """What a video file says about itself."""

    frames: int
    fps: float
    height: int
    width: int


class VisualProcessor(Protocol):
    """How one composition prepares images and videos; made by `Composition.processor`. Picklable; no state.

    The methods that take a size say what an item will be without its pixels; they agree with the others. Items that
    cannot be used (an extreme aspect ratio) raise `DataError`.
    """

    def with_limits(self, data: DataConfig) -> VisualProcessor:
        """The same with the limits of pixels, frames and frames per second that `data` states."""
        ...

    def image(self, pixels: np.ndarray) -> Placed:
        """One image, uint8 `[H, W, 3]` RGB."""
        ...

    def image_size(self, height: int, width: int) -> Placed:
        """What `image` answers for an image of that size, without patches."""
        ...

    def frames(self, clip: Clip) -> np.ndarray:
        """Indices int64 of the frames to look at, ascending."""
        ...

    def video(self, clip: Clip, pixels: np.ndarray) -> Placed:
        """The chosen frames of a video, uint8 `[T, H, W, 3]`."""
        ...

    def video_size(self, clip: Clip) -> Placed:
        """What `video` answers, without patches."""
        ...

    def position_ids(self, length: int, items: Sequence[PlacedItem]) -> np.ndarray:
        """int64 `[rank, length]` of one document: `rank` rows as the foundation takes them (1 or 3)."""
        ...

    @property
    def image_text(self) -> str:
        """What a chat template writes where an image stands: `<|vision_start|><|image_pad|><|vision_end|>`."""
        ...

    @property
    def video_text(self) -> str:
        """Likewise for a video."""
        ...

    @property
    def marks(self) -> tuple[str, ...]:
        """Special tokens that those texts and the items' placeholders are; a tokenizer that lacks one writes none."""
        ...


@runtime_checkable
class SoundProcessor(Protocol):
    """What a `VisualProcessor` has besides where its model hears; one that lacks it refuses rows with sounds.

    A sound is an item like any other: its windows are patches, `(1, windows, 1)` of them, and its encoder stands in the
    slot of the image encoder.
    """

    @property
    def sampling_rate(self) -> int:
        """Samples of a second that `sound` is given, whatever the file has."""
        ...

    @property
    def sound_text(self) -> str:
        """What a chat template writes where a sound stands."""
        ...

    def sound(self, samples: np.ndarray) -> Placed:
        """One sound, float32 `[samples]` of one channel, about -1 to 1."""
        ...

    def sound_size(self, samples: int) -> Placed:
        """What `sound` answers for that many samples, without patches."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedItem:
    """Where an item's features stand in a document."""

    start: int
    """Position of the first one."""
    grid: tuple[int, int, int]
    seconds_per_grid: float


@runtime_checkable
class SampleSource(Protocol):
    """Samples in training order."""

    def __len__(self) -> int:
        """Number of samples that exist: at least `SourceRequest.num_samples`."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index` of the training order. Deterministic; safe to call in a worker process."""
        ...

    def fingerprint(self) -> Mapping[str, str]:
        """Facts that must not change for a resume to be exact (files, sizes, seed, packing), by name; short strings."""
        ...

    def report(self) -> Mapping[str, Any]:
        """What a user should know once: documents, tokens, dropped and truncated rows, packing yield."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What samples hold, before any of it is read: a row for each document, in the order of the samples."""

    documents: np.ndarray
    """int64 `[documents, k]`: the source's own numbers of each, for `Measured.fill`."""
    samples: np.ndarray
    """int64 `[documents]`: place of its sample among those that were asked for; ascending, every sample has one."""
    lengths: np.ndarray
    """int64 `[documents]`: positions it takes in a sequence, what pads its segment included. The whole sequence where
    samples are not packed: then a document stays alone."""
    items: np.ndarray
    """int64 `[documents]`: images and videos in it."""
    grids: np.ndarray
    """int64 `[items, 3]`: (t, h, w) of each in patches, document after document."""


@runtime_checkable
class Measured(SampleSource, Protocol):
    """A source that knows the sizes of its samples and can put their documents into other sequences: what balancing
    needs."""

    def contents(self, numbers: Sequence[int]) -> Contents:
        """What the samples of these numbers hold. Reads no tokens and decodes nothing; the same on every rank."""
        ...

    def fill(self, documents: np.ndarray) -> Sample:
        """A sequence of `documents` `[n, k]`, rows of `Contents.documents` whose lengths fit; there may be none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRequest:
    """Everything a source may depend on."""

    paths: tuple[str, ...]
    """As the user gave them: files, prefixes, weights between them."""
    split: str | None
    """Shares for training, validation and test, or None: everything is the one asked for."""
    part: str
    """`train`, `valid` or `test`."""
    seq_length: int
    num_samples: int
    """Samples the run will ask for; the source repeats its data in further epochs to reach them."""
    seed: int
    shuffle: bool
    packing: bool
    segment_multiple: int
    """Packed segments have lengths that are multiples of this (2 x context parallel size, tensor parallel size)."""
    vocab_size: int
    """Rows of the model's embedding that stand for tokens; every token id must be below it."""
    tokenizer_path: str | None
    """Directory with `tokenizer.json`; a source opens its own tokenizer, so that workers need not receive one."""
    tokenizer_type: str | None
    """`HFTokenizer`, `NullTokenizer` or None: HFTokenizer when there is a path."""
    chat_template: str | None
    """File of a Jinja chat template that replaces the tokenizer's own."""
    cache: Path
    """Directory for derived files; may not exist yet. Several processes may arrive at once."""
    text_field: str
    messages_field: str
    train_on_prompt: bool
    overlong: str
    """`error`, `drop`, `truncate` or `split`."""
    loss_mask_eod: bool
    is_builder: bool
    """True on the one process per node that may write into `cache`; the others wait at `barrier` and then read."""
    data_format: str = "auto"
    """`openai`, `sharegpt` or `alpaca`, the form of every row of conversations; `auto`: each row's own fields tell."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Values the chat template reads besides the conversation, by name."""
    history_mask_loss: bool = False
    """Of the assistant's turns in a conversation only the last one counts."""
    visual: VisualProcessor | None = None
    """How images and videos are prepared; None for a model without an encoder."""
    position_rank: int = 1
    """Rows of position ids."""
    pixels: bool = True
    """Whether this process needs the patches; where it never runs the encoder, sizes are enough and nothing is
    decoded."""
    may_leave_out: int | None = 0
    """Rows that may be left out, by name, because they cannot be used; None: any number, the run counts them."""
    verify_media: bool = False
    """Decode every image, video and sound once before training."""
    barrier: Any
    """`barrier() -> None`: every process of the job meets here. A no-op when there is one process."""
