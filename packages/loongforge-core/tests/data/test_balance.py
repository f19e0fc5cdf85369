"""A deal reaches the loader as it is, ranks that disagree are told, and a wrong answer of a balancer is an error."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loongforge.core.config.run import ComponentConfig, DataConfig, ModelConfig, RunConfig
from loongforge.core.data.balance import Deal, dealt, require_one_deal
from loongforge.core.data.contract import Contents, Measured, Sample
from loongforge.core.data.loader import Loader, LoaderShape
from loongforge.core.data.open import _balancer
from loongforge.core.errors import DataError

LENGTH = 8


class Letters:
    """Sample i is made of two documents, the letters 2i and 2i + 1, each of half a sequence; letter 9 is broken."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Sample:
        return self.fill(np.array([[2 * index], [2 * index + 1]]))

    def contents(self, numbers: Sequence[int]) -> Contents:
        first = np.asarray(numbers)[:, None] * 2
        documents = (first + np.array([[0, 1]])).reshape(-1, 1)
        return Contents(
            documents=documents,
            samples=np.repeat(np.arange(len(numbers)), 2),
            lengths=np.full(len(documents), LENGTH // 2),
            items=np.zeros(len(documents), dtype=np.int64),
            grids=np.empty((0, 3), dtype=np.int64),
        )

    def fill(self, documents: np.ndarray) -> Sample:
        if 9 in documents:
            raise DataError("nothing is written there")
        tokens = np.zeros(LENGTH, dtype=np.int64)
        tokens[: len(documents) * 4] = np.repeat(documents[:, 0], 4)
        return Sample(
            tokens=tokens, labels=tokens, loss_mask=np.ones(LENGTH, dtype=np.float32),
            position_ids=np.arange(LENGTH) % 4, cu_seqlens=np.array([0, 4, 8], dtype=np.int32),
        )  # fmt: skip

    def fingerprint(self) -> dict[str, str]:
        return {}

    def report(self) -> dict[str, str]:
        return {}


def backwards(contents: Contents) -> Deal:
    """The last document comes first."""
    count = len(contents.samples)
    return Deal(
        sequences=(count - 1 - np.arange(count)) // 2, numbers={"balance_ratio": float(contents.documents[0, 0])}
    )


def shape(**changes: Any) -> LoaderShape:
    values: dict[str, Any] = {"micro_batch_size": 1, "num_microbatches": 1, "dp_size": 2}
    return LoaderShape(**{**values, **changes})


@pytest.mark.parametrize("workers", [0, 2])
def test_every_rank_gets_what_it_was_dealt(workers: int) -> None:
    for rank, expected in ((0, [3, 2]), (1, [1, 0])):
        one = shape(dp_rank=rank, num_workers=workers)
        with Loader(Letters(), one, dealt(Letters(), backwards, one, LENGTH)) as loader:
            assert loader.deal is None
            for step in range(2):
                (batch,) = loader.step()
                assert sorted(set(batch["tokens"][0].tolist())) == sorted(4 * step + one for one in expected)
                assert batch["sample_ids"].tolist() == [2 * step + expected[0] // 2]
                assert loader.deal is not None
                assert loader.deal.numbers == {"balance_ratio": 4.0 * step}, "of this step, however far workers are"
            assert loader.position == 4


def test_a_document_that_cannot_be_read_names_its_samples() -> None:
    """Letter 9 shares a sequence with one of another sample."""
    one = shape(dp_rank=1, start_sample=4)

    def mixed(contents: Contents) -> Deal:
        return Deal(sequences=np.array([0, 1, 1, 0]))

    with (
        Loader(Letters(), one, dealt(Letters(), mixed, one, LENGTH)) as loader,
        pytest.raises(DataError, match=r"documents of samples 4, 5 cannot be read: nothing is written there"),
    ):
        loader.step()


@pytest.mark.parametrize(
    ("sequences", "said"),
    [
        ([0, 1], "has dealt 2 documents to the sequences 0 to 1; there are 4 and 2"),
        ([0, 0, 1, 2], "has dealt 4 documents to the sequences 0 to 2; there are 4 and 2"),
        ([0, 0, 1, 0], "has put 12 positions into a sequence of 8"),
    ],
)
def test_a_deal_that_is_none(sequences: list[int], said: str) -> None:
    steps = dealt(Letters(), lambda _: Deal(sequences=np.array(sequences)), shape(), LENGTH)
    with pytest.raises(DataError, match=f"^data.balance: the balancer {said}"):
        next(steps)


def test_a_source_that_knows_no_sizes_is_refused() -> None:
    plan: Any = SimpleNamespace(
        config=RunConfig(
            model=ModelConfig(foundation=ComponentConfig(family="acme", geometry=None)),
            data=DataConfig(balance="analytic"),
        )
    )
    unmeasured: Any = SimpleNamespace(fingerprint=dict)
    assert isinstance(Letters(), Measured)
    with pytest.raises(DataError, match=r"data.balance=analytic: the source 'plain' does not know the sizes"):
        _balancer(plan, unmeasured, "plain")


def test_ranks_that_read_other_sizes_have_other_digests() -> None:
    """The deal is the same, and yet they would read other documents."""

    class Shorter(Letters):
        def contents(self, numbers: Sequence[int]) -> Contents:
            found = super().contents(numbers)
            found.lengths[0] -= 1
            return found

    here, there = (next(dealt(source, backwards, shape(), LENGTH)) for source in (Letters(), Shorter()))
    assert here.digest == next(dealt(Letters(), backwards, shape(dp_rank=1), LENGTH)).digest
    assert here.digest != there.digest
    agreeing: Any = SimpleNamespace(gather=lambda digest: [digest, digest])
    require_one_deal(here, agreeing, 7, 7)
    split: Any = SimpleNamespace(gather=lambda digest: [digest, there.digest])
    with pytest.raises(DataError, match=r"ranks \[1\] have dealt the samples of step 8 otherwise than rank 0"):
        require_one_deal(here, split, 7, 7)
    require_one_deal(here, split, 8, 7)  # not yet looked at
    require_one_deal(None, split, 7, 7)
