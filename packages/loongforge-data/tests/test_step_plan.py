"""A whole step dealt to micro-batches: caps hold, ranks agree, and costs are those of the model."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from loongforge.core.config.resolve import resolve
from loongforge.core.plan import Plan
from loongforge.core.plan.compute import encoder_flops, flops_per_token
from loongforge.data.balance import StepPlan, assign, plan_step
from loongforge.data.balance.cost import AnalyticCost
from loongforge.data.items import ItemError

CAP = 4096


def step(ranks: int, parts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of a step that was packed as it came, and the rank of each."""
    generator = np.random.default_rng(seed)
    drawn = np.exp(np.log(220) + generator.standard_normal(60 * ranks * parts))
    tokens = np.clip(drawn, 4, CAP).astype(np.int64)
    space, pack, packs = CAP, 0, []
    for length in tokens.tolist():
        if length > space:
            space, pack = CAP, pack + 1
        space -= length
        packs.append(pack)
    kept = np.array(packs) < ranks * parts
    return tokens[kept], np.array(packs)[kept] % ranks


def cost(tokens: np.ndarray) -> np.ndarray:
    return tokens + tokens.astype(np.float64) ** 2 / 2100


def check(plan: StepPlan, tokens: np.ndarray, cap: int) -> None:
    """Every item in one micro-batch, none of which is over the cap."""
    dealt = [items for rank in range(plan.ranks) for items in plan.items(rank)]
    assert len(dealt) == plan.ranks * plan.micro_batches
    assert sorted(itertools.chain(*dealt)) == list(range(len(tokens)))
    assert max(int(tokens[items].sum()) for items in dealt) <= cap


@pytest.mark.parametrize("ranks", [3, 16])
def test_a_step_is_even_within_its_caps(ranks: int) -> None:
    tokens, home = step(ranks, 4, 0)
    costs = cost(tokens)
    anew = plan_step(costs, tokens, ranks=ranks, micro_batches=4, cap=CAP)
    near = plan_step(costs, tokens, ranks=ranks, micro_batches=4, cap=CAP, home=home)
    rows = plan_step(costs, tokens, ranks=ranks, micro_batches=4, cap=CAP, sync="micro_batch")
    for plan in (anew, near, rows):
        check(plan, tokens, CAP)
    assert anew.ratio <= 1.002
    assert near.ratio <= 1.022
    assert (anew.moved, rows.moved) == (0, 0)
    assert near.moved == tokens[near.slots // 4 != home].sum() / tokens.sum()
    assert near.moved <= 0.08
    loads = [[costs[items].sum() for items in rows.items(rank)] for rank in range(ranks)]
    assert rows.time == pytest.approx(sum(max(row) for row in zip(*loads, strict=True)))
    in_turn = [[costs[items].sum() for items in anew.items(rank)] for rank in range(ranks)]
    crossed = [loads if rank % 2 else loads[::-1] for rank, loads in enumerate(in_turn)]
    assert rows.time <= sum(max(row) for row in zip(*in_turn, strict=True))
    assert rows.time < 0.99 * sum(max(row) for row in zip(*crossed, strict=True))
    assert anew.time == pytest.approx(max(map(sum, in_turn)))
    assert anew.mean == pytest.approx(costs.sum() / ranks)


def test_samples_of_one_size_are_dealt_as_the_loader_wants_them() -> None:
    """A token each and the micro-batch size for a cap: every micro-batch has as many samples."""
    costs = np.random.default_rng(0).lognormal(0, 0.7, 2 * 4 * 8)
    plan = plan_step(costs, np.ones(64, dtype=int), ranks=4, micro_batches=8, cap=2)
    assert {len(items) for rank in range(4) for items in plan.items(rank)} == {2}
    assert plan.ratio <= 1.01
    assert max(costs.reshape(8, 4, 2).sum(axis=(0, 2))) / plan.bound > 1.1


def test_components_of_a_cost_follow_each_other() -> None:
    tokens, _ = step(8, 4, 1)
    seen = np.where(np.random.default_rng(1).random(len(tokens)) < 0.4, 3.0 * tokens, 0.0)
    costs = np.stack([cost(tokens), seen], axis=1)
    plan = plan_step(costs, tokens, ranks=8, micro_batches=4, cap=CAP)
    check(plan, tokens, CAP)
    by_rank = plan.slots // 4
    assert plan.time == pytest.approx(sum(np.bincount(by_rank, column, 8).max() for column in costs.T))
    assert plan.ratio < 1.02
    summed = assign(costs.sum(axis=1), 8)
    assert sum(max(column[items].sum() for items in summed) for column in costs.T) > 1.02 * plan.bound


def test_items_that_hardly_fit_and_items_that_do_not() -> None:
    full = plan_step([9, 1, 1, 1, 1, 1], [7, 3, 6, 4, 5, 5], ranks=3, micro_batches=1, cap=10)
    check(full, np.array([7, 3, 6, 4, 5, 5]), 10)
    with pytest.raises(ItemError, match=r"18 tokens need 3 micro-batches of cap=9 and there are 2: raise the cap"):
        plan_step([1, 1, 1], [6, 6, 6], ranks=1, micro_batches=2, cap=9)
    with pytest.raises(ItemError, match=r"item 1 has 12, more than cap=10"):
        plan_step([1, 1], [6, 12], ranks=1, micro_batches=2, cap=10)
    with pytest.raises(ItemError, match=r"sync='rank' must be 'step' or 'micro_batch'"):
        plan_step([1], [1], ranks=1, micro_batches=1, cap=1, sync="rank")  # pyright: ignore
    with pytest.raises(ItemError, match="leave home out"):
        plan_step([1], [1], ranks=1, micro_batches=1, cap=1, home=[0], sync="micro_batch")


def test_nothing_to_deal() -> None:
    plan = plan_step([], [], ranks=2, micro_batches=2, cap=8)
    assert (plan.items(1), plan.ratio, plan.moved) == ([[], []], 1.0, 0.0)


DIGEST = """
import numpy as np
from loongforge.data.balance import plan_step
tokens = np.random.default_rng(5).integers(1, 900, 400)
costs = tokens + tokens.astype(float) ** 2 / 700
found = [
    plan_step(costs, tokens, ranks=8, micro_batches=8, cap=4096, home=home).digest
    for home in (None, np.arange(400) % 8)
]
"""


def test_another_process_comes_to_the_same_plan() -> None:
    here: dict[str, Any] = {}
    exec(DIGEST, here)
    there = subprocess.run(
        [sys.executable, "-c", f"{DIGEST}\nprint(found)"], capture_output=True, check=True, text=True
    )
    assert there.stdout.strip() == str(here["found"])
    assert here["found"][0] != here["found"][1]


TINY = {
    "num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 112, "num_attention_heads": 6, "num_query_groups": 2,
    "kv_channels": 20, "vocab_size": 256,
}  # fmt: skip


def plan_of(size: str, *more: str) -> Plan:
    sizes = [f"model.foundation.{name}={value}" for name, value in TINY.items()] if not more else list(more)
    words = ["--model-name", size, "--train-iters", "1", "--seq-length", "64", "--global-batch-size", "1", *sizes]
    return Plan.of(resolve(words, note=lambda _: None), 1)


def test_documents_cost_their_tokens_and_their_own_attention() -> None:
    costs = AnalyticCost(plan_of("qwen3_0_6b"))
    layer = 48 * (2 * 6 * 20 + 2 * 2 * 20) + 3 * 48 * 112  # query, output, key, value; gate, up, down
    matrices = 2 * layer + 48 * 256
    seen = 2 * 2 * 6 * 20  # queries with keys, probabilities with values, of two layers
    expected = [6 * (matrices * length + seen * length**2 / 2) for length in (24, 96)]
    assert costs.foundation([24, 96]).tolist() == expected
    assert costs.foundation([64])[0] == 64 * flops_per_token(costs.plan)
    assert costs.foundation([120])[0] > sum(expected)  # two documents of a pack do not see each other


def test_images_cost_by_frame() -> None:
    costs = AnalyticCost(plan_of("qwen3_vl_2b", "--mock-data"))
    grids = [[1, 16, 16], [4, 16, 16], [1, 32, 32], [1, 16, 16]]
    found = costs.encoder(grids)
    assert found.tolist() == [encoder_flops(costs.plan, grid) for grid in grids]
    assert found[1] == pytest.approx(4 * found[0])  # frames do not see each other
    assert found[2] > found[1]  # as many patches in one frame do
    assert costs.encoder(np.empty((0, 3))).shape == (0,)
