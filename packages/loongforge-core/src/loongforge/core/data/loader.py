"""From samples by number to the micro-batches of one rank.

Optimizer step `g` of a run that began at sample `s` is made of the samples `s + g*G` to `s + (g+1)*G - 1`, where
`G = micro_batch_size x dp_size x num_microbatches`. Micro-batch `m` of data parallel rank `d` holds the
`micro_batch_size` samples from `s + g*G + (m*dp_size + d) * micro_batch_size` on, or what a balancer deals it of the
step's samples. Which samples a step sees therefore depends on `s`, `g` and `G` alone, never on the number of ranks, the
micro-batch size or the number of workers.

Every rank of a tensor, pipeline or context parallel group reads the samples of its data parallel rank by itself: a
source is deterministic and answers any number, so nothing is broadcast.
"""

from __future__ import annotations

import itertools
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from loongforge.core.data.balance import Chosen, DealtStep
from loongforge.core.data.contract import Measured, Sample, SampleSource
from loongforge.core.data.quarantine import Bad, BadSampleError, Document, Forgiving
from loongforge.core.errors import DataError

Settle = Callable[[int, Mapping[Document, tuple[int, Bad]]], Collection[Document]]
"""From a step's number, from 1, and the documents that this rank could not read, each with the number of its sample, to
all that no rank takes. Collective."""
MicroBatch = dict[str, Any]
"""`tokens`, `labels` int64 and `loss_mask` float32, `[B, S]` = `[micro_batch_size, seq_length]`, `position_ids` int64
`[B, S]`, or `[3, B, S]` of three rows, and `sample_ids` int64: the `B` samples it is, or those that its documents come
from.

A packed micro-batch is one row, `[1, B * S]` (and `[3, 1, B * S]`), with `cu_seqlens` int32 `[segments + 1]` over the
whole row and `max_seqlen`, the int length of its longest segment.

For a model that sees: `grid` int64 `[n, 3]`, (t, h, w) in patches of all items, sample after sample; `items_of` int64
`[B]`, how many of them each sample has; `visual_positions` int64 `[features]`, ascending, into `[B * S]`; and `pixels`
float32 `[P, patch_dim]`, the items' patches, absent without items and where they are not wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderShape:
    """Which samples one rank reads, and how."""

    micro_batch_size: int
    num_microbatches: int
    """Micro-batches of one rank per optimizer step."""
    dp_rank: int = 0
    dp_size: int = 1
    num_workers: int = 0
    """Worker processes; 0 reads in the calling process. The order is the same for any number."""
    start_sample: int = 0
    """Samples consumed before, by all ranks together."""
    position_rank: int = 1
    """Rows of position ids; a source of text alone gives one, which is repeated."""
    visual: bool = False
    """Micro-batches say which items they hold, also when a source knows none."""

    def __post_init__(self) -> None:
        assert 0 <= self.dp_rank < self.dp_size, f"dp_rank {self.dp_rank} of {self.dp_size}"
        assert min(self.micro_batch_size, self.num_microbatches) > 0, "batch sizes are positive"
        assert min(self.num_workers, self.start_sample) >= 0, "workers and position are not negative"

    @property
    def global_batch_size(self) -> int:
        """Samples per optimizer step over all ranks."""
        return self.micro_batch_size * self.dp_size * self.num_microbatches

    def steps(self, count: int) -> range:
        """First sample of each whole step that fits before sample `count`."""
        return range(self.start_sample, count - self.global_batch_size + 1, self.global_batch_size)

    def samples(self, count: int) -> Iterator[list[int]]:
        """Sample numbers of each micro-batch of this rank, for the whole steps that fit before sample `count`."""
        for step in self.steps(count):
            for number in range(self.num_microbatches):
                first = step + (number * self.dp_size + self.dp_rank) * self.micro_batch_size
                yield list(range(first, first + self.micro_batch_size))


class Loader:
    """Iterates over the micro-batches of this rank, `num_microbatches` per optimizer step.

    Ends (`StopIteration`) when the source has no samples for another whole step. A sample that cannot be read raises
    `DataError` with its number. Close it when the run ends early, or use it as a context manager. `dealt` are the steps
    as a balancer dealt them; by position without. With `settle`, documents that some rank cannot read are left out on
    all, and `step` is collective.
    """

    def __init__(
        self,
        source: SampleSource,
        shape: LoaderShape,
        dealt: Iterator[DealtStep] | None = None,
        settle: Settle | None = None,
    ) -> None:
        self._source, self._shape, self._settle = source, shape, settle
        self._planned: deque[DealtStep] = deque()  # workers ask for samples some steps before they are trained
        self._deal: DealtStep | None = None
        self._steps = 0
        self._handed_out = 0
        self._waited = 0.0
        with warnings.catch_warnings():
            # Workers only read arrays: no thread here holds a lock they need, and they leave processors idle.
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            loader = DataLoader(
                _Guarded(source),
                batch_sampler=(  # pyright: ignore[reportArgumentType]
                    shape.samples(len(source)) if dealt is None else _rows_of(dealt, self._planned, shape)
                ),
                num_workers=shape.num_workers,
                collate_fn=list,
                worker_init_fn=_outlive_signals if shape.num_workers else None,
                prefetch_factor=2 if shape.num_workers else None,
                multiprocessing_context="fork" if shape.num_workers else None,
                generator=torch.Generator(),  # the global one would shift the model's random numbers
            )
            self._batches = iter(loader)

    @property
    def position(self) -> int:
        """Samples consumed by all ranks: moves on when the last micro-batch of a step has been handed out."""
        return self._shape.start_sample + self._steps * self._shape.global_batch_size

    @property
    def deal(self) -> DealtStep | None:
        """How the step was dealt that is being handed out; None without a balancer."""
        return self._deal

    @property
    def waited(self) -> float:
        """Seconds the caller has waited for data so far."""
        return self._waited

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> MicroBatch:
        """The next micro-batch."""
        began = time.perf_counter()
        batch = _collate(self._fetch(), self._shape)
        self._waited += time.perf_counter() - began
        return batch

    def step(self) -> list[MicroBatch]:
        """All micro-batches of the next optimizer step; `DataError` when the source is at its end."""
        first, count = self.position, self._shape.num_microbatches
        try:
            if self._settle is None:
                return [next(self) for _ in range(count)]
            began = time.perf_counter()
            answers = [self._fetch() for _ in range(count)]
        except StopIteration:
            raise DataError(
                f"no data for another step at sample {self.position}: the source has fewer than "
                f"{self.position + self._shape.global_batch_size} samples."
            ) from None
        self._waited += time.perf_counter() - began
        answers = self._settled(first, answers, self._settle)
        return [_collate(answers.pop(0), self._shape) for _ in range(count)]  # what was read goes as batches come

    def _fetch(self) -> list[Answer]:
        try:
            answers = next(self._batches)
        except RuntimeError as error:  # torch raises it when a worker process is gone
            raise DataError(
                f"a data worker ended after sample {self.position}: {error}. It may have run out of memory: "
                f"try a smaller --num-workers, 0 reads in the training process."
            ) from error
        if self._planned and not self._handed_out:
            self._deal = self._planned.popleft()
        self._handed_out += 1
        if self._handed_out == self._shape.num_microbatches:
            self._handed_out = 0
            self._steps += 1
        return answers

    def _settled(self, first: int, answers: list[list[Answer]], settle: Settle) -> list[list[Answer]]:
        """The answers of the step that begins at sample `first`, without the documents that some rank cannot read."""
        size = self._shape.global_batch_size
        failed = [one for batch in answers for one in batch if isinstance(one, _Failed)]
        found = {document: bad for one in failed for document, bad in one.bad.items()}
        left_out = settle(first // size + 1, _with_samples(self._source, range(first, first + size), found))
        if not left_out:
            return answers
        places = itertools.count()
        return [[self._without(one, next(places), left_out) for one in batch] for batch in answers]

    def _without(self, answer: Answer, place: int, left_out: Collection[Document]) -> Answer:
        """The answer, read again if it holds such documents; it is sequence `place` of this rank's in the step."""
        assert isinstance(self._source, Forgiving), "only such a source raises BadSampleError"
        dealt = self._deal
        documents = dealt.sequences[place].documents if dealt else self._source.contents(answer.numbers).documents
        if not any(tuple(document) in left_out for document in documents.tolist()):
            return answer
        return _Numbered(answer.numbers, self._source.fill_without(documents, left_out))

    def close(self) -> None:
        """End the worker processes."""
        self._batches = iter(())

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows_of(steps: Iterator[DealtStep], planned: deque[DealtStep], shape: LoaderShape) -> Iterator[list[Chosen]]:
    """The sequences of each micro-batch; steps are noted in `planned` before their first one."""
    for step in steps:
        planned.append(step)
        yield from (list(rows) for rows in itertools.batched(step.sequences, shape.micro_batch_size))


@dataclass(frozen=True, slots=True)
class _Numbered:
    numbers: tuple[int, ...]
    sample: Sample


@dataclass(frozen=True, slots=True)
class _Failed:
    numbers: tuple[int, ...]
    reason: str
    bad: Mapping[Document, Bad] = field(default_factory=dict)
    """Documents that may be left out."""


Answer = _Numbered | _Failed


class _Guarded(Dataset[Any]):
    """The source for torch's loader: a failure travels to the trainer as a value, not as a worker's stack trace."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source

    def __getitem__(self, wanted: int | Chosen) -> Answer:
        numbers = wanted.samples if isinstance(wanted, Chosen) else (wanted,)
        try:
            return _Numbered(numbers, self._read(wanted))
        except BadSampleError as error:
            return _Failed(numbers, str(error), error.bad)
        except DataError as error:
            return _Failed(numbers, str(error))
        except Exception as error:  # noqa: BLE001  any source's failure is told with its sample number, in the trainer
            return _Failed(numbers, f"{type(error).__name__}: {error}")

    def _read(self, wanted: int | Chosen) -> Sample:
        if isinstance(wanted, int):
            return self._source[wanted]
        assert isinstance(self._source, Measured), "only a source that is measured is dealt"
        return self._source.fill(wanted.documents)


def _with_samples(source: SampleSource, step: range, bad: Mapping[Document, Bad]) -> dict[Document, tuple[int, Bad]]:
    """Documents of a step with the numbers of their samples."""
    if not bad:
        return {}
    assert isinstance(source, Forgiving), "only such a source raises BadSampleError"
    contents = source.contents(step)
    owners = zip(map(tuple, contents.documents.tolist()), contents.samples.tolist(), strict=True)
    samples = {document: step[place] for document, place in owners}
    return {document: (samples[document], one) for document, one in bad.items()}


def _outlive_signals(_: int) -> None:
    """Leave SIGTERM and SIGINT to the trainer: it needs data to finish its step. Workers end with their parent."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _collate(answers: list[Answer], shape: LoaderShape) -> MicroBatch:
    samples: list[Sample] = []
    for answer in answers:
        if isinstance(answer, _Failed):
            which = "sample" if len(answer.numbers) == 1 else "documents of samples"
            remedy = " --max-bad-samples N goes on without up to N such." if answer.bad else ""
            raise DataError(f"{which} {', '.join(map(str, answer.numbers))} cannot be read: {answer.reason}{remedy}")
        samples.append(answer.sample)
    numbers = list(dict.fromkeys(number for answer in answers for number in answer.numbers))
    segments = [sample["cu_seqlens"] for sample in samples if "cu_seqlens" in sample]
    if 0 < len(segments) < len(samples):
        raise DataError(f"samples {numbers}: packed and unpacked ones do not mix.")
    fields = ("tokens", "labels", "loss_mask")
    batch: MicroBatch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in fields}
    batch["position_ids"] = _position_ids(samples, shape.position_rank)
    batch["sample_ids"] = torch.tensor(numbers)
    rows, length = batch["tokens"].shape
    if segments:
        batch |= {name: batch[name].reshape(1, rows * length) for name in fields}
        positions = batch["position_ids"]
        batch["position_ids"] = positions.reshape(*positions.shape[:-2], 1, rows * length)
        ends = [borders[1:] + row * length for row, borders in enumerate(segments)]
        cu_seqlens = np.concatenate([np.zeros(1, dtype=np.int32), *ends]).astype(np.int32)
        batch["cu_seqlens"] = torch.from_numpy(cu_seqlens)
        batch["max_seqlen"] = int(np.diff(cu_seqlens).max())
    if shape.visual:
        batch |= _visual(samples, numbers, length)
    return batch


def _position_ids(samples: list[Sample], rank: int) -> torch.Tensor:
    """`[B, S]`, or `[rank, B, S]`."""
    rows = [sample["position_ids"] for sample in samples]
    if rank > 1:
        rows = [np.broadcast_to(row, (rank, row.shape[-1])) for row in rows]
    return torch.from_numpy(np.stack(rows, axis=-2))


def _visual(samples: list[Sample], numbers: list[int], length: int) -> MicroBatch:
    """Items of all samples; positions count through the whole micro-batch."""
    none = np.empty(0, dtype=np.int64)
    grids = [sample.get("grid", none.reshape(0, 3)) for sample in samples]
    positions = [sample.get("visual_positions", none) + row * length for row, sample in enumerate(samples)]
    pixels = [sample["pixels"] for sample in samples if "pixels" in sample]
    seeing = sum(len(grid) > 0 for grid in grids)
    if 0 < len(pixels) < seeing:
        raise DataError(f"samples {numbers}: of {seeing} sequences with images only {len(pixels)} bring pixels.")
    batch: MicroBatch = {
        "grid": torch.from_numpy(np.concatenate(grids)),
        "items_of": torch.tensor([len(grid) for grid in grids]),
        "visual_positions": torch.from_numpy(np.concatenate(positions)),
    }
    if pixels:
        batch["pixels"] = torch.from_numpy(np.concatenate(pixels))
    return batch
