"""Adapters go on where they were, on other layouts too, with their own numbers alone; and begin on a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

PLAIN = ["--lora-rank", "4", "--lora-alpha", "6", "--lora-patterns", "layers.1.* rank=2 alpha=5", "k_proj rank=3"]
TP2_SP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
ZERO1 = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
EXPORT = ["--save-hf", "true"]
RUNS: dict[str, tuple[list[str], int]] = {
    "one-dropout-recompute": (["--lora-dropout", "0.2", *RECOMPUTE], 1),
    "dp2-zero1-bf16": ([*ZERO1, "--bf16"], 2),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name: str, tied: Any, tmp_path: Path) -> None:
    flags, world = RUNS[name]
    flags = [*PLAIN, *flags, *EXPORT]
    tied.train(tmp_path / "whole", flags, world)
    resumed = tied.back(tmp_path / "whole", tmp_path / "resumed")
    assert "Resuming at step 3, sample 12" in tied.train(resumed, flags, world)
    tied.same_bits(resumed, tmp_path / "whole")
    assert all(".lora_" in key for key in tied.export(resumed))


def converted(run: Path, target: Path) -> None:
    """The verb writes what the run wrote at its end."""
    from loongforge.ckpt.convert.command import command

    assert command([str(run), str(target)]) == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (target / name).read_bytes() == (run / "hf" / name).read_bytes()


def test_another_layout_gives_the_same_numbers(tied: Any, tmp_path: Path) -> None:
    """From fresh adapters, and from a checkpoint of one process."""
    tied.train(tmp_path / "one", [*PLAIN, *EXPORT])
    resumed = tied.back(tmp_path / "one", tmp_path / "resumed")
    tied.train(resumed, [*PLAIN, *TP2_SP, *EXPORT], 2)
    tied.train(tmp_path / "two", [*PLAIN, *TP2_SP, *EXPORT], 2)
    converted(tmp_path / "one", tmp_path / "converted")
    expected, weights = tied.curve(tmp_path / "one"), tied.export(tmp_path / "one")
    for run in (resumed, tmp_path / "two"):
        for (_, loss, norm, _), (_, other, other_norm, _) in zip(tied.curve(run), expected, strict=True):
            assert loss == pytest.approx(other, rel=1e-5)
            assert norm == pytest.approx(other_norm, rel=1e-3)
        for key, tensor in tied.export(run).items():
            # Six steps of at most 1e-2 each; Adam divides by a gradient's own size, so rounding grows where it is tiny.
            assert (tensor - weights[key]).abs().mean() < 1e-4, key


def test_adapters_keep_their_numbers_and_begin_on_a_trained_model(tied: Any, whole: Path, tmp_path: Path) -> None:
    tied.train(tmp_path / "run", PLAIN)
    for name, flags, said in (
        ("alpha", [*PLAIN, "--lora-alpha", "7"], "lora.alpha was 6.0, is 7.0. Adapters mean something"),
        ("none", [], "holds adapters, and this run has none: give --lora-rank 4"),
    ):
        copy = tied.back(tmp_path / "run", tmp_path / name)
        assert said in tied.refused(copy, flags)
    assert "was trained without adapters" in tied.refused(tied.back(whole, tmp_path / "plain"), PLAIN)
    said = tied.train(tmp_path / "tuned", [*PLAIN, *EXPORT, "--load", str(whole), "--finetune"])
    assert f"with the weights of {whole}" in said
    assert "foundation lora" in said
    (_, first, *_), *_ = tied.curve(tmp_path / "tuned")
    last = tied.curve(whole)[-1][1]
    assert first < tied.curve(tmp_path / "run")[0][1], "it begins where the other run ended"
    assert abs(first - last) < 1
    assert all(torch.isfinite(tensor).all() for tensor in tied.export(tmp_path / "tuned").values())
