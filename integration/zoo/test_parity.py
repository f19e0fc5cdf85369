"""Every case in every layout against its reference: logits, loss, and each gradient."""

from __future__ import annotations

from typing import Any

import pytest
from case import LAYOUTS
from cases import CASES

from loongforge.core.testing import fp32_tolerance

PAIRS = [(name, layout) for name, case in CASES.items() for layout in case.layouts]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_logits_loss_and_every_gradient(name: str, layout: str, zoo: Any, results: dict[str, Any]) -> None:
    from proof import config_of, read

    from loongforge.ckpt.verify.difference import differences, ours
    from loongforge.core.plan import Plan

    case, expected = CASES[name], zoo.side(name)
    plan = Plan.of(config_of(case, zoo.checkpoint(name), layout), LAYOUTS[layout][1])
    assert plan.config.model.foundation.family == case.family
    found = differences(ours(plan, zoo.run(name, layout)), expected)
    worst = {"logits": 0.0, "loss": 0.0} | {one.name: one.worst for one in found}
    record = {
        "logits": worst.pop("logits"),
        "loss": worst.pop("loss"),
        "gradient": max(worst.values()),
        "where": max(worst, key=lambda key: worst[key]),
    }
    results.setdefault(name, {}).setdefault("parity", {})[layout] = record
    # Every tensor of the checkpoint has a gradient, and every gradient a tensor.
    assert expected.gradients.keys() == read(zoo.checkpoint(name)).keys()
    assert found[0].worst < fp32_tolerance(case.tolerance), found[:5]
