"""What one rank cannot read, no rank takes: by position and as dealt, with any workers, within a budget."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loongforge.core.config.run import DataConfig
from loongforge.core.data.balance import Deal, dealt
from loongforge.core.data.contract import Contents, Sample
from loongforge.core.data.loader import Loader, LoaderShape
from loongforge.core.data.mock import open_mock
from loongforge.core.data.quarantine import Accounted, Bad, BadSampleError, Budget, Document, Forgiving, Quarantine
from loongforge.core.errors import ConfigError, DataError

LENGTH, COUNT = 8, 48
BROKEN = {9, 10, 30}
"""Samples 4, 5 and 15 have such a letter; 4 and 5 stand side by side."""


class Letters:
    """Sample i is made of two documents, the letters 2i and 2i + 1, each of half a sequence; some cannot be read."""

    left_out: Sequence[Bad] = ()
    conversations = COUNT

    def __init__(self, *, seeing: bool = True) -> None:
        self._seeing = seeing

    def __len__(self) -> int:
        return COUNT // 2

    def __getitem__(self, index: int) -> Sample:
        return self.fill(self.contents([index]).documents)

    def contents(self, numbers: Sequence[int]) -> Contents:
        documents = (np.asarray(numbers)[:, None] * 2 + np.array([[0, 1]])).reshape(-1, 1)
        return Contents(
            documents=documents,
            samples=np.repeat(np.arange(len(numbers)), 2),
            lengths=np.full(len(documents), LENGTH // 2),
            items=np.zeros(len(documents), dtype=np.int64),
            grids=np.empty((0, 3), dtype=np.int64),
        )

    def fill(self, documents: np.ndarray) -> Sample:
        return self.fill_without(documents, ())

    def fill_without(self, documents: np.ndarray, left_out: Collection[Document]) -> Sample:
        letters = [letter for (letter,) in documents.tolist()]
        bad = [letter for letter in letters if letter in BROKEN and (letter,) not in left_out]
        if bad and self._seeing:
            raise BadSampleError({(letter,): Bad(file="a.tar", row=f"key {letter}", reason="torn") for letter in bad})
        kept = np.repeat([(letter,) not in left_out for letter in letters], LENGTH // 2)
        tokens = np.where(kept, np.repeat(letters, LENGTH // 2), -1)
        return Sample(
            tokens=tokens, labels=tokens, loss_mask=kept.astype(np.float32),
            position_ids=np.arange(LENGTH) % 4, cu_seqlens=np.array([0, 4, 8], dtype=np.int32),
        )  # fmt: skip

    def fingerprint(self) -> dict[str, str]:
        return {}

    def report(self) -> dict[str, str]:
        return {}


class Together:
    """As many threads as ranks, which meet as the processes of a job do."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count)
        self._values: dict[int, Any] = {}

    def run[T](self, work: Callable[[Rank], T]) -> list[T]:
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(lambda number: work(Rank(self, number)), range(self.count)))

    def meet(self, number: int, value: Any) -> list[Any]:
        self._values[number] = value
        self._barrier.wait(20)
        values = [self._values[one] for one in range(self.count)]
        self._barrier.wait(20)
        return values


class Rank:
    def __init__(self, job: Together, number: int) -> None:
        self.gather: Callable[[Any], list[Any]] = partial(job.meet, number)
        self.number, self.is_main = number, number == 0

    def total(self, count: int) -> int:
        return sum(self.gather(count))


def mirrored(contents: Contents) -> Deal:
    """The last document comes first: ranks trade sequences, and each sequence has documents of one sample."""
    count = len(contents.samples)
    return Deal(sequences=(count - 1 - np.arange(count)) // 2)


def crossed(contents: Contents) -> Deal:
    """Every sequence has documents of two samples."""
    count = len(contents.samples) // 2
    return Deal(sequences=np.tile(np.arange(count), 2))


def trained(
    rank: Rank, *, dp: int, budget: Budget, balancer: Any = None, workers: int = 0, start: int = 0, state: Any = None,
    file: Path | None = None,
) -> tuple[list[list[int]], dict[str, Any]]:  # fmt: skip
    """Letters of each step of six samples that count on this rank, and what a checkpoint would keep.

    Of two ranks that share a data parallel rank, as the stages of a pipeline do, only the first one sees.
    """
    source = Letters(seeing=rank.number < dp)
    quarantine = Quarantine(budget, rank, file)
    quarantine.restore(state or {})
    quarantine.begin([source])
    micro = {1: 3, 2: 1, 3: 2}[dp]
    shape = LoaderShape(
        micro_batch_size=micro, num_microbatches=6 // dp // micro, dp_rank=rank.number % dp, dp_size=dp,
        num_workers=workers, start_sample=start,
    )  # fmt: skip
    steps: list[list[int]] = []
    deals = dealt(source, balancer, shape, LENGTH) if balancer else None
    with Loader(source, shape, deals, partial(quarantine.settle, "train")) as loader:
        for _ in range((len(source) - start) // 6):
            batches = loader.step()
            steps.append([one for b in batches for one in b["tokens"][b["loss_mask"] > 0].reshape(-1).tolist()])
            assert all(batch["tokens"].numel() == LENGTH * micro for batch in batches), "shapes stay"
    return steps, quarantine.state()


def letters(steps: Sequence[list[int]], dp: int) -> list[int]:
    """All that ranks of different data took, each letter once for its four tokens."""
    found = sorted(letter for rank in steps[:dp] for letter in rank)
    return found[::4] if found == sorted(found[::4] * 4) else found


@pytest.mark.parametrize("balancer", [None, mirrored, crossed])
@pytest.mark.parametrize(("dp", "ranks", "workers"), [(1, 1, 2), (1, 2, 0), (2, 2, 0), (3, 6, 0)])
def test_all_ranks_leave_out_the_same(dp: int, ranks: int, workers: int, balancer: Any) -> None:
    budget = Budget(samples=3)
    seen = Together(ranks).run(partial(trained, dp=dp, budget=budget, balancer=balancer, workers=workers))
    for step in range(4):
        expected = [letter for letter in range(12 * step, 12 * step + 12) if letter not in BROKEN]
        assert letters([steps[step] for steps, _ in seen], dp) == expected
    for number in range(ranks):
        assert seen[number] == (seen[number % dp][0], seen[0][1]), (
            "of one data parallel rank the same data, of all the same state"
        )
    state = seen[0][1]
    assert [(one["row"], one["sample"], one["step"]) for one in state["entries"]] == [
        ("key 9", 4, 1), ("key 10", 5, 1), ("key 30", 15, 3),
    ]  # fmt: skip
    assert len(json.dumps(state)) < 1000


def test_a_run_goes_on_from_what_it_knew(tmp_path: Path) -> None:
    file = tmp_path / "quarantine.jsonl"
    work = partial(trained, budget=Budget(samples=3), file=file)
    whole = Together(2).run(partial(work, dp=2))
    named = [json.loads(line)["row"] for line in file.read_text().splitlines()]
    assert named == ["key 9", "key 10", "key 30"]
    known = {**whole[0][1], "entries": whole[0][1]["entries"][:2]}
    rest = Together(3).run(partial(work, dp=3, start=6, state=known))
    assert rest[0][1] == rest[2][1]
    for step in range(3):
        taken = letters([steps[step] for steps, _ in rest], 3)
        assert taken == letters([steps[step + 1] for steps, _ in whole], 2)
    assert [json.loads(line)["row"] for line in file.read_text().splitlines()] == named
    two = partial(work, dp=1, budget=Budget(samples=2))
    with pytest.raises(DataError, match=r"a.tar:key 30: torn\nBad conversations: 3 bad, --max-bad-samples 2"):
        Together(1).run(partial(two, start=6, state=known))


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(samples=1), "2 bad, --max-bad-samples 1 allows no more"),
        (Budget(ratio=0.03), "2 of 48 bad, --max-bad-ratio 0.03 allows no more"),
        (Budget(run=1), "2 samples in a row bad, --max-bad-run 1 allows no more"),
        (Budget(run=2, samples=2), "3 bad, --max-bad-samples 2 allows no more"),
        (Budget(run=0), "1 samples in a row bad, --max-bad-run 0 allows no more"),
    ],
)
def test_over_budget_all_ranks_say_the_same(budget: Budget, said: str) -> None:
    def work(rank: Rank) -> str:
        with pytest.raises(DataError) as caught:
            trained(rank, dp=2, budget=budget)
        return str(caught.value)

    one, other = Together(2).run(work)
    assert one == other
    assert f"Bad conversations: {said}. Repair or remove them." in one
    assert trained(Together(1).run(lambda rank: rank)[0], dp=1, budget=Budget(run=2, samples=3))


def test_without_a_budget_the_first_one_ends_the_run() -> None:
    shape = LoaderShape(micro_batch_size=6, num_microbatches=1)
    with (
        Loader(Letters(), shape) as loader,
        pytest.raises(DataError, match=r"^sample 4 cannot be read: a.tar:key 9: torn"),
    ):
        loader.step()


def test_what_a_source_has_left_out_counts_from_the_beginning() -> None:
    class Lacking(Letters):
        left_out = (Bad(file="b.jsonl", row=7, reason="not JSON"),)

    (rank,) = Together(1).run(lambda rank: rank)
    assert isinstance(Lacking(), Accounted)
    assert isinstance(Lacking(), Forgiving)
    quarantine = Quarantine(Budget(samples=1), rank)
    quarantine.begin([Lacking(), Lacking()])
    assert len(quarantine) == 1
    assert quarantine.state() == {}, "the cache knows it"
    assert quarantine.numbers() == {"quarantined": 1.0}
    with pytest.raises(
        DataError, match=r"b.jsonl:7: not JSON\nBad conversations: 1 bad, and none is allowed: .*delete the data"
    ):
        Quarantine(Budget(), rank).begin([Lacking()])
    mock: Any = open_mock
    with pytest.raises(DataError, match="this source leaves nothing out"):
        Quarantine(Budget(ratio=0.5), rank).begin([mock])


@pytest.mark.parametrize("wrong", [{"max_bad_samples": -1}, {"max_bad_run": -1}, {"max_bad_ratio": 1.5}])
def test_budgets_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        DataConfig(**wrong)
