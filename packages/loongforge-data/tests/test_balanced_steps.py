"""What `data.balance` runs: sources know sizes before reading, and steps are dealt evenly with the same documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike

from loongforge.core import plugins
from loongforge.core.config.resolve import resolve
from loongforge.core.data.balance import dealt, meeting
from loongforge.core.data.contract import Contents, Measured
from loongforge.core.data.loader import Loader, LoaderShape
from loongforge.core.plan import Plan
from loongforge.data.balance.step import StepBalancer, open_analytic
from loongforge.data.balance.trade import traded
from loongforge.data.chat import open_chat
from loongforge.data.indexed import token_type, write_index
from loongforge.data.text import open_text
from loongforge.data.vlm import open_vlm

SEQ = 128


class Squares:
    """Costs that a test can reckon: a token 1, attention the square, an item its patches."""

    def foundation(self, lengths: ArrayLike) -> np.ndarray:
        sizes = np.asarray(lengths, dtype=np.float64)
        return sizes + sizes**2 / 16

    def encoder(self, grids: ArrayLike) -> np.ndarray:
        return np.asarray(grids, dtype=np.float64).reshape(-1, 3).prod(axis=1)


@pytest.fixture
def seeing(make_request, seeing_tokenizer_dir, processor, pictures: Path, write_rows, tmp_path: Path) -> Any:
    """Opens conversations with no, one and two images, from two files of unequal weight."""
    for name, first in (("a", 0), ("b", 7)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": "<image>" * (number % 3) + f"q{number}"},
                    {"role": "assistant", "content": "forge " * (1 + number * 5 % 7)},
                ],
                "images": [f"{(number + k) % 6}.png" for k in range(number % 3)],
            }
            for number in range(first, first + 12)
        ]
        write_rows(pictures / f"{name}.jsonl", rows)

    def build(**changes: Any) -> Any:
        values = {"tokenizer_path": str(seeing_tokenizer_dir), "seq_length": SEQ, "visual": processor}
        values |= {"paths": ("0.3", str(pictures / "a.jsonl"), "0.7", str(pictures / "b.jsonl"))}
        return open_vlm(make_request(tmp_path / "cache", **{**values, "position_rank": 3, **changes}))

    return build


@pytest.fixture
def chats(make_request, tokenizer_dir, write_rows, tmp_path: Path) -> Callable[..., Any]:
    """Opens conversations of very unequal length."""
    rows = [
        [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": "forge " * (1 + number * 7 % 16)}]
        for number in range(60)
    ]
    file = write_rows(tmp_path / "chats.jsonl", [{"messages": row} for row in rows])

    def build(**changes: Any) -> Any:
        values = {"paths": (str(file),), "tokenizer_path": str(tokenizer_dir), "seq_length": SEQ, "packing": True}
        return open_chat(make_request(tmp_path / "cache", **{**values, **changes}))

    return build


def plan_of(dp: int, parts: int, rows: int = 1, *more: str) -> Plan:
    words = ["--model-name", "qwen3_0_6b", "--train-iters", "1", "--seq-length", str(SEQ)]
    words += ["--micro-batch-size", str(rows), "--global-batch-size", str(dp * parts * rows)]
    return Plan.of(resolve([*words, *more], note=lambda _: None), dp)


def check_contents(source: Measured, numbers: list[int]) -> None:
    """What the source says about samples is what they turn out to be, and `fill` makes them anew."""
    contents = source.contents(numbers)
    items = np.concatenate([[0], np.cumsum(contents.items)])
    for place, number in enumerate(numbers):
        mine = np.flatnonzero(contents.samples == place)
        sample, again = source[number], source.fill(contents.documents[mine])
        assert set(sample) == set(again)
        for name, values in sample.items():
            np.testing.assert_array_equal(values, again[name], err_msg=name)  # pyright: ignore[reportArgumentType]
        ends = sample["cu_seqlens"].tolist() if "cu_seqlens" in sample else [0, SEQ]
        sizes = [end - start for start, end in pairwise(ends)]
        assert contents.lengths[mine].tolist() == sizes[: len(mine)]
        assert not sample["loss_mask"][sum(sizes[: len(mine)]) :].any(), "the rest is padding"
        grids = [contents.grids[items[one] : items[one + 1]] for one in mine]
        if "grid" in sample:
            np.testing.assert_array_equal(np.concatenate(grids), sample["grid"])


@pytest.mark.parametrize("packing", [True, False])
def test_sources_know_what_their_samples_hold(packing: bool, chats, seeing) -> None:
    """Over the end of an epoch, out of order."""
    numbers = [3, 0, 41, 17, 40, 8]
    check_contents(chats(packing=packing, segment_multiple=4), numbers)
    check_contents(seeing(packing=packing), numbers)
    assert len(set(chats().contents(numbers).samples)) == len(numbers)


def test_windows_of_text_all_cost_the_same(make_request, tmp_path: Path) -> None:
    kind = token_type(512)
    np.concatenate([np.arange(300), np.arange(200)]).astype(kind).tofile(tmp_path / "text.bin")
    write_index(tmp_path / "text.idx", np.array([300, 200]), kind)
    source = open_text(make_request(tmp_path, paths=(str(tmp_path / "text"),), seq_length=SEQ))
    check_contents(source, [5, 2, 9])
    deal = open_analytic(plan_of(2, 2))(source.contents(range(4)))
    assert deal.sequences.tolist() == [0, 2, 1, 3], "by position: nothing is to be gained"
    assert {deal.numbers["balance_before"], deal.numbers["balance_ratio"], deal.numbers["balance_bound"]} == {1.0}


def by_hand(contents: Contents, sequences: np.ndarray, dp: int, parts: int, rows: int, *, meet: bool) -> float:
    """Time of a step from the segments that are computed, padding included."""
    costs, seen = Squares(), np.repeat(np.arange(len(contents.items)), contents.items)
    loads = np.zeros((2, dp, parts))
    for sequence in range(dp * parts * rows):
        rank, place = divmod(sequence, parts * rows)
        here = contents.lengths[sequences == sequence].tolist()
        part = place // rows
        loads[0, rank, part] += costs.foundation([*here, SEQ - sum(here)]).sum()
        loads[1, rank, part] += costs.encoder(
            contents.grids[np.isin(seen, np.flatnonzero(sequences == sequence))]
        ).sum()
    return float(loads.max(axis=1).sum()) if meet else float(loads.sum(axis=(0, 2)).max())


@pytest.mark.parametrize(("dp", "parts", "rows"), [(2, 4, 1), (4, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("sync", ["step", "micro_batch"])
@pytest.mark.parametrize("kind", ["packed text", "packed images", "images alone"])
def test_a_step_is_dealt_evenly(kind: str, sync: str, dp: int, parts: int, rows: int, chats, seeing) -> None:
    source = chats() if kind == "packed text" else seeing(packing=kind == "packed images", shuffle=True)
    count = dp * parts * rows
    balancer = StepBalancer(plan_of(dp, parts, rows, f"data.balance_sync={sync}"), Squares())
    balancer._encoder_share = 1.0  # the plan's model has no encoder
    gains = []
    for first in range(0, 3 * count, count):
        contents = source.contents(range(first, first + count))
        deal = balancer(contents)
        assert np.array_equal(deal.sequences, balancer(contents).sequences)
        assert np.bincount(deal.sequences, contents.lengths, count).max() <= SEQ
        assert ((deal.sequences >= 0) & (deal.sequences < count)).all()
        before, after = deal.numbers["balance_before"], deal.numbers["balance_ratio"]
        assert 1 <= after <= before
        place = (
            contents.samples // rows % dp * parts + contents.samples // rows // dp
        ) * rows + contents.samples % rows
        times = [by_hand(contents, one, dp, parts, rows, meet=sync == "micro_batch") for one in (place, deal.sequences)]
        assert times[1] / times[0] == pytest.approx(after / before)
        gains.append(before / after)
    assert max(gains) > 1.01


def test_trades_even_out_full_sequences() -> None:
    """One rank has a long document, the other short ones of the same length together; no position is free."""
    lengths = np.array([60, 60, 8, 30, 30, 30, 30, 8])
    costs = lengths**2.0
    before = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    after = traded(costs, lengths, before, ranks=2, parts=1, room=128)
    assert np.bincount(after, lengths).tolist() == [128, 128]
    assert np.bincount(before, costs).tolist() == [7264, 3664]
    assert np.bincount(after, costs).tolist() == [5464, 5464]
    same = traded(costs[:2], np.array([100, 100]), np.array([0, 1]), ranks=2, parts=1, room=100)
    assert same.tolist() == [0, 1], "nothing fits"


def test_the_whole_way_through_loaders(chats) -> None:
    """All documents of each step, once, whatever the number of ranks and of worker processes."""
    source = chats(num_samples=24)

    def seen(dp: int, workers: int, start: int = 0) -> list[list[bytes]]:
        steps: list[list[bytes]] = [[] for _ in range((24 - start) // 8)]
        digests: list[list[int]] = []
        for rank in range(dp):
            shape = LoaderShape(
                micro_batch_size=2, num_microbatches=4 // dp, dp_rank=rank, dp_size=dp, num_workers=workers,
                start_sample=start,
            )  # fmt: skip
            balancer = StepBalancer(plan_of(dp, 4 // dp, 2), Squares())
            with Loader(source, shape, dealt(source, balancer, shape, SEQ)) as loader:
                digests.append([])
                for step in steps:
                    for batch in loader.step():
                        ends = batch["cu_seqlens"].tolist()
                        pieces = [batch["tokens"][0, one:two].numpy() for one, two in pairwise(ends)]
                        step += [piece.tobytes() for piece in pieces if len(set(piece.tolist())) > 1]
                    assert loader.deal is not None
                    digests[-1].append(loader.deal.digest)
                assert loader.position == 24
        assert all(one == digests[0] for one in digests), "ranks agree"
        assert len(set(digests[0])) == len(steps)
        return [sorted(step) for step in steps]

    whole = seen(1, 0)
    assert seen(2, 0) == seen(4, 2) == whole
    assert seen(4, 0, start=8) == whole[1:]


def test_ranks_meet_where_the_layout_says() -> None:
    assert meeting(plan_of(2, 1)) == "step"
    experts = ["--train-iters", "1", "--seq-length", "64", "--model-name", "qwen3_30b_a3b"]

    def of(world: int, *more: str) -> str:
        return meeting(Plan.of(resolve([*experts, *more], note=lambda _: None), world))

    spread = ["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"]
    assert of(2) == "step"
    assert of(2, *spread) == "micro_batch"
    tp2 = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    assert of(4, *spread, *tp2) == "step", "experts are spread over tensor parallel ranks alone"
    assert of(2, "model.foundation.moe_router_load_balancing_type=global_aux_loss",
              "model.foundation.moe_aux_loss_coeff=0.001") == "micro_batch"  # fmt: skip


def test_a_cost_model_of_another_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chats) -> None:
    """Registered as a balancer, named by the run."""
    package = tmp_path / "site"
    (package / "acme_costs.dist-info").mkdir(parents=True)
    (package / "acme_costs.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: acme-costs\nVersion: 1.0\n")
    (package / "acme_costs.dist-info/entry_points.txt").write_text("[loongforge.balancers]\nacme = acme_costs:SPEC\n")
    (package / "acme_costs.py").write_text(
        "from loongforge.core.plugins import BalancerSpec, Lazy\n"
        "SPEC = BalancerSpec(name='acme', api=(1, 0), open=Lazy('acme_costs:open_'))\n"
        "def open_(plan):\n"
        "    from loongforge.data.balance.step import StepBalancer\n"
        "    import numpy as np\n"
        "    class Cubes:\n"
        "        def foundation(self, lengths): return np.asarray(lengths, float) ** 3\n"
        "        def encoder(self, grids): return np.zeros(len(grids))\n"
        "    return StepBalancer(plan, Cubes())\n"
    )
    monkeypatch.syspath_prepend(str(package))
    plan = plan_of(2, 4, 1, "--balance", "acme")
    assert plan.config.data.balance == "acme"
    deal = plugins.load("balancers", "acme").open()(plan)(chats().contents(range(8)))
    assert json.dumps(dict(deal.numbers)) != "{}"
    assert deal.numbers["balance_ratio"] < deal.numbers["balance_before"]
