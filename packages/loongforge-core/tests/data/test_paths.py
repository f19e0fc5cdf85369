"""Words after `--data-path`: weights in every spelling of a number, and paths."""

from __future__ import annotations

from pathlib import Path

import pytest

from loongforge.core.cli.train import check_data_paths
from loongforge.core.config import resolve
from loongforge.core.data.open import cache_directory
from loongforge.core.data.paths import weight_of, without_weights
from loongforge.core.errors import DataError
from loongforge.core.plan import Plan


@pytest.mark.parametrize(
    ("word", "weight"),
    [("0.7", 0.7), ("1e-1", 0.1), ("1E2", 100), (".5", 0.5), ("-1", -1), ("inf", None), ("nan", None), ("1_0", None),
     ("1.jsonl", None), ("2024", 2024), ("data/2024", None), ("e1", None)],
)  # fmt: skip
def test_weights_are_numbers(word: str, weight: float | None) -> None:
    assert weight_of(word) == weight


def test_weights_are_no_files(tmp_path: Path) -> None:
    """Before a run starts, and where its cache goes."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    words = ["1e-1", str(tmp_path / "a.jsonl"), "9E-1", str(tmp_path / "b.jsonl")]
    assert without_weights(words) == words[1::2]
    config = resolve.resolve(["--model-name", "qwen3-0.6b", "--train-iters", "1", "--data-path", *words])
    check_data_paths(config)
    assert cache_directory(Plan.of(config, 1), config.data.data_path) == tmp_path / ".loongforge_cache"
    absent = resolve.resolve(["--model-name", "qwen3-0.6b", "--train-iters", "1", "--data-path", "1e-1", "nowhere"])
    with pytest.raises(DataError) as caught:
        check_data_paths(absent)
    assert caught.value.problems == ("--data-path: no file 'nowhere', nor nowhere.bin beside nowhere.idx.",)
