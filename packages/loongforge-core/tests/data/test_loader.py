"""Which samples a step sees depends on the position alone: not on ranks, micro-batches, workers or restarts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from loongforge.core.data.contract import SampleSource, SourceRequest
from loongforge.core.data.loader import Loader, LoaderShape
from loongforge.core.data.mock import open_mock
from loongforge.core.errors import DataError


def mock(num_samples: int = 96, **changes: Any) -> SampleSource:
    values: dict[str, Any] = {
        "paths": (),
        "split": None,
        "part": "train",
        "seq_length": 8,
        "num_samples": num_samples,
        "seed": 3,
        "shuffle": True,
        "packing": False,
        "segment_multiple": 2,
        "vocab_size": 100,
        "tokenizer_path": None,
        "tokenizer_type": None,
        "chat_template": None,
        "cache": Path("unused"),
        "text_field": "text",
        "messages_field": "messages",
        "train_on_prompt": False,
        "overlong": "truncate",
        "loss_mask_eod": False,
        "is_builder": True,
        "barrier": lambda: None,
    }
    return open_mock(SourceRequest(**{**values, **changes}))


class Broken:
    """Sample 5 cannot be read."""

    def __init__(self, error: Exception) -> None:
        self._source = mock()
        self._error = error

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int):
        if index == 5:
            raise self._error
        return self._source[index]

    def fingerprint(self) -> dict[str, str]:
        return {}

    def report(self) -> dict[str, str]:
        return {}


def steps_seen(
    count: int, *, batch: int = 12, dp: int, micro: int, workers: int = 0, start: int = 0
) -> list[list[int]]:
    """Sorted sample numbers of each of `count` optimizer steps over all ranks."""
    shape = {"micro_batch_size": micro, "num_microbatches": batch // micro // dp, "dp_size": dp, "num_workers": workers}
    steps: list[list[int]] = [[] for _ in range(count)]
    for rank in range(dp):
        with Loader(mock(), LoaderShape(dp_rank=rank, start_sample=start, **shape)) as loader:
            for step in steps:
                step.extend(number for one in loader.step() for number in one["sample_ids"].tolist())
    return [sorted(step) for step in steps]


@pytest.mark.parametrize(
    ("dp", "micro", "workers"), [(1, 1, 0), (1, 12, 0), (2, 3, 0), (3, 2, 0), (4, 1, 0), (2, 2, 2)]
)
def test_a_step_is_the_same_samples_however_it_is_divided(dp: int, micro: int, workers: int) -> None:
    expected = [list(range(step * 12, step * 12 + 12)) for step in range(3)]
    assert steps_seen(3, dp=dp, micro=micro, workers=workers) == expected


def test_resume_goes_on_with_another_number_of_ranks() -> None:
    whole = steps_seen(5, dp=4, micro=3)
    first = steps_seen(2, dp=4, micro=3)
    rest = steps_seen(3, dp=3, micro=2, start=24)
    assert first + rest == whole
    assert steps_seen(2, batch=6, dp=1, micro=3, start=24) == [list(range(24, 30)), list(range(30, 36))]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_keep_the_order_and_the_bits(workers: int) -> None:
    shape = {"micro_batch_size": 2, "num_microbatches": 2, "dp_rank": 1, "dp_size": 2}
    with (
        Loader(mock(), LoaderShape(**shape)) as inline,
        Loader(mock(), LoaderShape(num_workers=workers, **shape)) as worked,
    ):
        for expected, got in zip(inline, worked, strict=True):
            assert expected.keys() == got.keys()
            for name in expected:
                assert torch.equal(torch.as_tensor(expected[name]), torch.as_tensor(got[name])), name
        assert inline.position == worked.position == 96


def test_position_moves_with_whole_steps_and_waiting_is_measured() -> None:
    with Loader(mock(26), LoaderShape(micro_batch_size=2, num_microbatches=2, dp_size=2, start_sample=2)) as loader:
        positions = []
        for batch in loader:
            assert batch["tokens"].shape == (2, 8)
            assert batch["tokens"].dtype == batch["labels"].dtype == batch["position_ids"].dtype == torch.int64
            assert batch["loss_mask"].dtype == torch.float32
            positions.append(loader.position)
        assert positions == [2, 10, 10, 18, 18, 26]
        assert 0 < loader.waited < 10
        with pytest.raises(DataError, match="no data for another step at sample 26"):
            loader.step()


def test_packed_micro_batch_is_one_row_with_all_borders() -> None:
    source = mock(packing=True, seq_length=32)
    with Loader(source, LoaderShape(micro_batch_size=3, num_microbatches=1)) as loader:
        batch = loader.step()[0]
    assert batch["tokens"].shape == batch["loss_mask"].shape == (1, 96)
    borders = batch["cu_seqlens"]
    assert borders.dtype == torch.int32
    expected = [0] + [int(end) + 32 * row for row in range(3) for end in source[row].get("cu_seqlens", [])[1:]]
    assert borders.tolist() == expected
    assert batch["max_seqlen"] == int(borders.diff().max())
    for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
        assert batch["loss_mask"][0, end - 1] == 0
        assert (end - start) % 2 == 0
    np.testing.assert_array_equal(batch["tokens"][0, 64:].numpy(), source[2]["tokens"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "text"), [(DataError("bad row"), "bad row"), (KeyError("lost"), "KeyError: 'lost'")], ids=["own", "other"]
)
def test_a_failing_sample_reaches_the_trainer_by_number(workers: int, error: Exception, text: str) -> None:
    shape = LoaderShape(micro_batch_size=2, num_microbatches=1, num_workers=workers)
    with Loader(Broken(error), shape) as loader:
        loader.step()
        loader.step()
        with pytest.raises(DataError) as caught:
            loader.step()
    assert str(caught.value) == f"sample 5 cannot be read: {text}"


def test_packed_and_plain_samples_do_not_mix() -> None:
    class Mixed(Broken):
        def __getitem__(self, index: int):
            return mock(packing=bool(index % 2))[index]

    with (
        pytest.raises(DataError, match=r"samples \[0, 1\]: packed and unpacked ones do not mix"),
        Loader(Mixed(KeyError()), LoaderShape(micro_batch_size=2, num_microbatches=1)) as loader,
    ):
        loader.step()


def test_the_models_random_numbers_are_not_touched() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with Loader(mock(), LoaderShape(micro_batch_size=2, num_microbatches=1, num_workers=1)) as loader:
        loader.step()
        assert torch.equal(torch.rand(3), expected)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def test_workers_outlive_signals_and_end_with_the_loader() -> None:
    """A scheduler signals every process of a job; the trainer still needs data for the step it is in."""
    before = children()
    loader = Loader(mock(), LoaderShape(micro_batch_size=2, num_microbatches=1, num_workers=2))
    loader.step()
    workers = children() - before
    assert len(workers) == 2
    time.sleep(0.2)
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    assert [loader.step()[0]["sample_ids"].tolist() for _ in range(20)][-1] == [40, 41]
    assert workers <= children()
    loader.close()
    assert not workers & children()


def test_a_killed_worker_is_a_data_error() -> None:
    before = children()
    with Loader(mock(4000), LoaderShape(micro_batch_size=2, num_microbatches=1, num_workers=1)) as loader:
        loader.step()
        for worker in children() - before:
            os.kill(worker, signal.SIGKILL)
        with pytest.raises(DataError, match=r"data worker ended after sample .*--num-workers"):
            _ = [loader.step() for _ in range(2000)]


def test_mock_is_a_function_of_seed_and_number() -> None:
    one, two, other = mock(packing=True), mock(packing=True), mock(packing=True, seed=4)
    for name in ("tokens", "labels", "loss_mask", "cu_seqlens"):
        np.testing.assert_array_equal(dict(one[7])[name], dict(two[7])[name])
    assert (one[7]["tokens"] != other[7]["tokens"]).any()
    assert (one[7]["tokens"] != one[8]["tokens"]).any()
    assert one.fingerprint() == two.fingerprint() != other.fingerprint()
    assert isinstance(one, SampleSource)
    with pytest.raises(DataError, match="multiple of 3"):
        mock(packing=True, segment_multiple=3)
