"""Routing that megatron-core does not compute is refused; names of experts count over the whole model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loongforge.core.errors import ConfigError
from loongforge.core.model.geometry import ExpertGeometry
from loongforge.core.model.names import whole_model_name, whole_model_names

SIGMOID: dict[str, Any] = {"score_function": "sigmoid"}
GROUPS: dict[str, Any] = {**SIGMOID, "num_groups": 4, "topk_groups": 2, "topk": 4}


def geometry(**changes: Any) -> ExpertGeometry:
    return ExpertGeometry(**{"num_experts": 8, "topk": 2, "ffn_hidden_size": 4, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"normalise_topk": False}, {"normalise_topk": False, "topk": 1}, SIGMOID, {**SIGMOID, "expert_bias": True},
        GROUPS, {**GROUPS, "expert_bias": True}, {**SIGMOID, "topk": 1, "normalise_topk": False},
        {**SIGMOID, "num_groups": 1, "topk_groups": 1, "topk": 5},
        {"normalise_topk": False, "num_groups": 4, "topk_groups": 3, "topk": 6, "group_score": "best"},
    ],
)  # fmt: skip
def test_routing_of_released_models_is_accepted(changes: dict[str, Any]) -> None:
    geometry(**changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"topk": 9}, r"topk=9 must be between 1 and num_experts=8\."),
        ({"topk": 1}, "normalise_topk=True makes every weight 1 with topk=1"),
        ({**SIGMOID, "normalise_topk": False}, "normalise_topk=False goes with score_function='softmax'"),
        ({"expert_bias": True}, "expert_bias=True goes with score_function='sigmoid', not with 'softmax'"),
        ({"num_groups": 4}, "num_groups=4 and topk_groups=None go together"),
        ({**GROUPS, "num_groups": 3}, "num_groups=3 must divide num_experts=8"),
        ({**GROUPS, "topk_groups": 5}, "topk_groups=5 must be between 1 and num_groups=4"),
        ({**GROUPS, "topk": 6}, "topk=6 is more than topk_groups=2 groups have experts"),
        ({**GROUPS, "num_groups": 8, "topk_groups": 8}, "needs groups of at least two experts"),
        ({**GROUPS, "score_function": "softmax"}, "groups with score_function='softmax' need normalise_topk=False"),
    ],
)
def test_other_routing_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        geometry(**changes)


class Experts(torch.nn.Module):
    """Stands for megatron-core's experts on one rank of three."""

    def __init__(self) -> None:
        super().__init__()
        self.ep_group, self.num_local_experts = SimpleNamespace(rank=lambda: 2), 4
        self.local_experts = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(4))


def test_experts_and_layers_are_numbered_over_the_whole_model() -> None:
    layer = torch.nn.Module()
    layer.layer_number = 6  # pyright: ignore[reportAttributeAccessIssue]
    layer.mlp = torch.nn.ModuleDict({"experts": Experts()})
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})
    name = "decoder.layers.0.mlp.experts.local_experts.1.weight"
    assert whole_model_name(chunk, name) == "decoder.layers.5.mlp.experts.local_experts.9.weight"
    assert [found.split(".")[-2] for found in whole_model_names([chunk])] == ["8", "9", "10", "11"]
