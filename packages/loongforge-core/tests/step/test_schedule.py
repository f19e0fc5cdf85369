"""Our wiring of megatron-core's schedule against the formulas, step by step, and which parameters decay."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loongforge.core.config.run import OptimizerConfig

ITERS, BATCH, WARMUP = 40, 6, 5
PEAK, LOW = 3e-3, 1e-4


@pytest.fixture(scope="module", autouse=True)
def megatron() -> None:
    from loongforge.core.megatron.start import start_megatron
    from loongforge.core.platform import choose

    start_megatron(choose("cpu").platform())


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core asks who it is before it logs; a launcher has said so in a real run."""
    monkeypatch.setenv("RANK", "0")


def rates(**options: Any) -> tuple[list[float], list[float]]:
    """Learning rate and weight decay that each of `ITERS` steps uses."""
    from loongforge.core.step.optimizer import build_schedule

    section = OptimizerConfig(lr=PEAK, min_lr=LOW, **options)
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0}])
    plan: Any = SimpleNamespace(config=SimpleNamespace(optimizer=section), global_batch_size=BATCH, train_iters=ITERS)
    schedule = build_schedule(plan, optimizer)
    group, seen = optimizer.param_groups[0], ([], [])
    for _ in range(ITERS):
        seen[0].append(group["lr"])
        seen[1].append(group["weight_decay"])
        schedule.step(increment=BATCH)
    return seen


def down(shape: Callable[[float], float]) -> list[float]:
    """Linear warm-up from 0, then `shape` of the share of the decay that is done, from 1 to 0."""

    def rate(step: int) -> float:
        if step <= WARMUP:
            return PEAK * step / WARMUP
        return LOW + (PEAK - LOW) * shape((step - WARMUP) / (ITERS - WARMUP))

    return [rate(step) for step in range(ITERS)]


def tail(shape: Callable[[float], float], length: int = 10) -> Callable[[float], float]:
    """1, and `shape` over the last `length` steps: what WSD does."""
    return lambda share: shape(max(0.0, (share * (ITERS - WARMUP) - (ITERS - WARMUP - length)) / length))


SHAPES: dict[str, tuple[dict[str, Any], Callable[[float], float]]] = {
    "linear": ({"lr_decay_style": "linear"}, lambda share: 1 - share),
    "cosine": ({"lr_decay_style": "cosine"}, lambda share: 0.5 * (1 + math.cos(math.pi * share))),
    "constant": ({"lr_decay_style": "constant"}, lambda share: 1.0),
    "WSD-linear": (
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 10, "lr_wsd_decay_style": "linear"},
        tail(lambda share: 1 - share),
    ),
    "WSD-exponential": (
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 10},
        tail(lambda share: 2 * 0.5**share - 1),
    ),
    "WSD-cosine": (
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 10, "lr_wsd_decay_style": "cosine"},
        tail(lambda share: 0.5 * (1 + math.cos(math.pi * share))),
    ),
    "WSD-minus_sqrt": (
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 10, "lr_wsd_decay_style": "minus_sqrt"},
        tail(lambda share: 1 - math.sqrt(share)),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_formula_after_warm_up(name: str) -> None:
    options, shape = SHAPES[name]
    assert rates(lr_warmup_iters=WARMUP, **options)[0] == pytest.approx(down(shape), rel=1e-9)
    assert rates(lr_warmup_fraction=WARMUP / ITERS, **options)[0] == pytest.approx(down(shape), rel=1e-9)


def test_warm_up_from_a_given_rate() -> None:
    found = rates(lr_warmup_iters=4, lr_warmup_init=1e-3)[0][:5]
    assert found == pytest.approx([1e-3, 1.5e-3, 2e-3, 2.5e-3, 3e-3])


def test_after_the_decay_the_rate_stays_low() -> None:
    found = rates(lr_decay_style="linear", lr_decay_iters=20)[0]
    assert found[10] == pytest.approx(LOW + (PEAK - LOW) / 2)
    assert found[20:] == pytest.approx([LOW] * 20)


def test_inverse_square_root() -> None:
    found = rates(lr_decay_style="inverse-square-root", lr_warmup_iters=4)[0]
    assert found[4:] == pytest.approx([PEAK * math.sqrt(4 / step) for step in range(4, ITERS)])


@pytest.mark.parametrize(
    ("style", "shape"),
    [("linear", lambda share: share), ("cosine", lambda share: 0.5 * (1 - math.cos(math.pi * share)))],
)
def test_weight_decay_grows(style: Any, shape: Callable[[float], float]) -> None:
    found = rates(start_weight_decay=0.02, end_weight_decay=0.1, weight_decay_incr_style=style)[1]
    assert found == pytest.approx([0.02 + 0.08 * shape(step / ITERS) for step in range(ITERS)])
    assert rates(weight_decay=0.3)[1] == [0.3] * ITERS


def test_vectors_and_biases_do_not_decay() -> None:
    """The overrides that `build_optimizer` starts from, on the names and shapes of a transformer layer."""
    from megatron.core.optimizer import OptimizerConfig as UpstreamConfig
    from megatron.core.optimizer import get_standard_config_overrides

    shapes = {
        "decoder.layers.0.input_layernorm.weight": (8,),
        "decoder.layers.0.self_attention.q_layernorm.weight": (4,),
        "decoder.layers.0.self_attention.linear_qkv.bias": (24,),
        "decoder.final_layernorm.weight": (8,),
        "decoder.layers.0.self_attention.linear_qkv.weight": (24, 8),
        "decoder.layers.0.mlp.linear_fc1.weight": (16, 8),
        "embedding.word_embeddings.weight": (29, 8),
    }
    overrides = get_standard_config_overrides(UpstreamConfig(optimizer="adam", lr=1.0))
    spared = {
        name
        for name, shape in shapes.items()
        for key, override in overrides.items()
        if key.matches(torch.nn.Parameter(torch.empty(shape)), name) and override.get("wd_mult") == 0.0
    }
    assert spared == {name for name, shape in shapes.items() if len(shape) == 1}
