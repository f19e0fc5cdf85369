"""Multi-token prediction beyond what every case proves: unequal micro-batches, recomputation, the distributed
optimizer, layers that are left out, and the report of acceptance."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from case import LAYOUTS
from cases import CASES
from predicting import SCALE
from reference import CLIP, DECAY, LEARNING_RATE
from safetensors.torch import load_file, save_file

from loongforge.core.testing import fp32_tolerance, run_distributed

RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1")
MODULES = ("--recompute-granularity", "selective", "--recompute-modules", "moe", "core_attn")
STEPS = [
    ("mimo", "cp2", ()),
    ("mimo", "pp2-vpp2", RECOMPUTE),
    ("deepseek_v3 predicting", "tp2-sp-ep2", MODULES),
]


STILL = ("--clip-grad", "0", "--lr", "0", "--min-lr", "0")


@pytest.mark.parametrize(("name", "layout", "flags"), STEPS)
def test_both_losses_of_unequal_micro_batches(
    name: str, layout: str, flags: tuple[str, ...], zoo: Any, results: dict[str, Any], tmp_path: Path
) -> None:
    """Each depth's loss is one mean over the tokens that count for it, whatever micro-batch or rank has them."""
    from proof import GRADIENTS, SEQUENCES, config_of, one_step, read

    from loongforge.ckpt.verify.batch import make_batch
    from loongforge.ckpt.verify.difference import Side, differences

    directory = zoo.checkpoint(name)
    config = config_of(CASES[name], directory, layout, *STILL, *flags)
    batch = make_batch(config, SEQUENCES)
    batch["loss_mask"][0, 5:] = 0
    batch["loss_mask"][2, :30] = 0
    batch["loss_mask"][3] = 1
    save_file(batch, tmp_path / "batch.safetensors")
    expected = zoo.reference.measure(
        name, directory, tmp_path / "batch.safetensors", tmp_path / "reference.safetensors"
    )
    found = run_distributed(partial(one_step, config=config, batch=batch, scratch=tmp_path), LAYOUTS[layout][1])[0]
    assert found.loss == pytest.approx(expected["loss"], rel=fp32_tolerance(1e-5))
    assert found.extra["mtp_loss"] * SCALE == pytest.approx(expected["extra"], rel=fp32_tolerance(1e-5))
    depths = [value for key, value in found.extra.items() if key.startswith("mtp_loss_")]
    assert len(depths) == (2 if name == "mimo" else 0)
    assert not depths or sum(depths) / 2 == pytest.approx(found.extra["mtp_loss"])
    gradients = load_file(tmp_path / "reference.safetensors")
    del gradients["logits"]
    apart = differences(
        Side(loss=found.loss, logits=torch.zeros(1), gradients=read(tmp_path / GRADIENTS)),
        Side(loss=expected["loss"], logits=torch.zeros(1), gradients=gradients),
    )
    results.setdefault(name, {}).setdefault("unequal", {})[layout] = apart[0].worst
    assert apart[0].worst < fp32_tolerance(CASES[name].tolerance), apart[:5]


def test_steps_with_the_distributed_optimizer(zoo: Any, tmp_path: Path) -> None:
    """Two data parallel ranks with parts of the optimizer each; the last stage's copy of the embedding stays equal."""
    from proof import SEQUENCES, WEIGHTS, config_of, read, train

    from loongforge.ckpt.verify.batch import make_batch

    name, directory = "mimo", zoo.checkpoint("mimo")
    rates = ("--lr", str(LEARNING_RATE), "--min-lr", str(LEARNING_RATE), "--weight-decay", str(DECAY))
    spread = ("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather")
    config = config_of(CASES[name], directory, "pp2", *rates, *spread, "--clip-grad", str(CLIP), "--adam-beta2", "0.95")
    batches = [make_batch(replace(config, train=replace(config.train, seed=seed)), SEQUENCES) for seed in range(3)]
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path, batch in zip(paths, batches, strict=True):
        save_file(batch, path)
    expected = zoo.reference.steps(name, directory, paths, tmp_path / "reference.safetensors")
    seen = run_distributed(partial(train, config=config, batches=batches, scratch=tmp_path), 4)[0]
    for (loss, norm), other, length in zip(seen, expected["losses"], expected["norms"], strict=True):
        assert (loss, norm) == (pytest.approx(other, rel=1e-4), pytest.approx(length, rel=1e-3))
    weights, found = load_file(tmp_path / "reference.safetensors"), read(tmp_path / WEIGHTS)
    assert found.keys() == weights.keys()
    # Three steps of at most about 1e-3 an entry; see test_steps.
    assert max(float((found[key] - one).abs().mean()) for key, one in weights.items()) < 1e-5


def left_out(worker: Any, config: Any, scratch: Path) -> list[str]:
    """Load, write an export; what loading said."""
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start

    with part_of(config) as part:
        notes = load_weights(part.plan, part.world, part.model, find_start(config.checkpoint))
        export_hf(part.plan, part.world, part.model, scratch / "export")
    return notes


@pytest.mark.parametrize("name", ["deepseek_v3 predicting", "qwen3_next predicting"])
def test_what_does_not_train_is_left_out_aloud(name: str, zoo: Any, tmp_path: Path) -> None:
    from proof import config_of, read

    directory = zoo.checkpoint(name)
    config = config_of(CASES[name], directory, "one", "--mtp-num-layers", "0")
    (notes,) = run_distributed(partial(left_out, config=config, scratch=tmp_path), 1)
    whole, rest = read(directory), read(tmp_path / "export")
    gone = whole.keys() - rest.keys()
    assert notes == [
        f"{directory}: {len(gone)} tensors of multi-token prediction are left out; "
        "--mtp-num-layers 1 trains them with the model."
    ]
    assert all(torch.equal(rest[key], whole[key]) for key in rest)
    said = json.loads((tmp_path / "export/config.json").read_text())
    assert said.get("num_nextn_predict_layers", 0) == 0


def counted(worker: Any, config: Any, batches: Any) -> Any:
    """What `loongforge bench mtp` counts of given micro-batches."""
    from loongforge.ckpt.bench.acceptance import count, summary
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start

    with part_of(config) as part:
        load_weights(part.plan, part.world, part.model, find_start(config.checkpoint))
        mine = list(batches[part.world.dp.rank() :: part.world.dp.size()])
        return summary(count(part, mine), config.train.seq_length)


@pytest.mark.parametrize("layout", ["one", "tp2-sp", "pp2"])
def test_acceptance_is_that_of_a_plain_loop(layout: str, zoo: Any, tmp_path: Path) -> None:
    from proof import LENGTH, SEQUENCES, config_of

    from loongforge.ckpt.verify.batch import make_batch

    directory = zoo.checkpoint("mimo")
    config = config_of(CASES["mimo"], directory, layout)
    batch = make_batch(config, SEQUENCES)
    # Tokens below 5 alone: of 131 two models would hardly ever choose the same.
    batch["tokens"] %= 5
    save_file(batch, tmp_path / "batch.safetensors")
    own, *further = zoo.reference.greedy("mimo", directory, tmp_path / "batch.safetensors")["chosen"]
    hits: list[list[int]] = [[], []]
    chained: list[list[int]] = [[], []]
    lengths: list[int] = []
    first_stretch: list[int] = []
    for row in range(SEQUENCES):
        for place in range(LENGTH):
            run, proposed = 1, True
            equal = True
            for depth in (1, 2):
                there = place + depth < LENGTH and bool(batch["loss_mask"][row][place + depth])
                if place + depth < LENGTH:
                    equal = equal and further[depth - 1][row][place] == own[row][place + depth]
                if there:
                    hits[depth - 1].append(further[depth - 1][row][place] == own[row][place + depth])
                    chained[depth - 1].append(equal)
                    if depth == 1 and place < LENGTH // 8:
                        first_stretch.append(hits[0][-1])
                    run += equal
                proposed = proposed and there
            if proposed:
                lengths.append(run)
    rows = [{name: one[at : at + 1] for name, one in batch.items()} for at in range(SEQUENCES)]
    found = run_distributed(partial(counted, config=config, batches=rows), LAYOUTS[layout][1])[0]
    assert found.rates == pytest.approx([sum(one) / len(one) for one in hits])
    assert found.chained == pytest.approx([sum(one) / len(one) for one in chained])
    assert found.mean_length == pytest.approx(sum(lengths) / len(lengths))
    assert found.tokens == len(lengths)
    assert found.by_position[0][:2] == (0, LENGTH // 8 - 1)
    assert found.by_position[0][2][0] == pytest.approx(sum(first_stretch) / len(first_stretch))
    assert len(found.by_position) == 8
    assert any(sum(one) for one in hits), "no agreement at all proves nothing"
