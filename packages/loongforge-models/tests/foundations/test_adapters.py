"""Where adapters can be, of every family: all matrices of its weight table, with the shapes that they have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loongforge.core import plugins
from loongforge.core.config.families import named
from loongforge.core.config.resolve import resolve
from loongforge.core.errors import PlanError
from loongforge.core.plan import Plan, count_parameters
from loongforge.core.plan.index import elements as index_elements
from loongforge.core.plan.lora import adapter_parameters, stage_adapters
from loongforge.core.plan.memory import stage_memory

FAMILIES = [
    plugin.name
    for plugin in plugins.usable("models")
    if plugin.spec.role == "foundation" and plugin.distribution == "loongforge-models"
]
"""Of our own wheel."""


def plan_of(model: str, *flags: str, world: int = 1) -> Plan:
    config = resolve(["--model-name", model, "--train-iters", "3", *flags], note=lambda _: None)
    return Plan.of(config, world)


def first_size(family: str) -> str:
    return next(iter(plugins.load("models", family).sizes)).replace("_", "-")


CASES = [(family, 0) for family in FAMILIES] + [(name, 1) for name in ("deepseek3", "glm4_moe", "mimo", "qwen3_next")]


@pytest.mark.parametrize(("family", "further"), CASES)
def test_every_matrix_can_have_an_adapter(family: str, further: int) -> None:
    """Their sizes add up to all parameters but embedding, output matrix, norms, biases, and what an indexer and a delta
    rule have."""
    flags = ("--mtp-num-layers", str(further)) if further else ()
    plan = plan_of(first_size(family), "--lora-rank", "4", "--lora-target-modules", "*", *flags)
    matrices = sum(one.matrix.inputs * one.matrix.outputs * (one.matrix.experts or 1) for one in plan.adapters)
    tables = (1 if plan.geometry.tie_word_embeddings else 2) * plan.padded_vocab_size * plan.geometry.hidden_size
    rest = count_parameters(plan.geometry, plan.padded_vocab_size) - tables - matrices
    rest -= (plan.geometry.num_layers + further) * index_elements(plan.geometry)
    assert 0 < rest < 5e-4 * matrices, "a shape is wrong"


def test_the_plan_counts_adapters_alone() -> None:
    flags = ("--lora-rank", "16", "--fp32", "--seq-length", "128")
    plan, whole = plan_of("qwen3-0.6b", *flags), plan_of("qwen3-0.6b", "--fp32", "--seq-length", "128")
    hidden, query, pair, width = 1024, 2048, 1024, 3072
    layer = (hidden + query) + 2 * (hidden + pair) + (query + hidden) + 3 * (hidden + width)
    assert adapter_parameters(plan) == 16 * 28 * layer
    (memory,), (before,) = stage_memory(plan), stage_memory(whole)
    assert memory.gradients == 4 * adapter_parameters(plan)
    assert memory.optimizer == 8 * adapter_parameters(plan)
    assert memory.weights == before.weights + 4 * adapter_parameters(plan)
    assert memory.gradients < before.gradients / 50


def test_ranks_hold_their_parts() -> None:
    flags = ("--lora-rank", "4", "--lora-target-modules", "q_proj", "o_proj", "mlp.gate", "experts.*.down_proj")
    layout = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--expert-model-parallel-size", "2")
    layout = (*layout, "--expert-tensor-parallel-size", "1", "--pipeline-model-parallel-size", "2")
    plan = plan_of("qwen3-30b-a3b", *flags, *layout, world=4)
    first, last = stage_adapters(plan)
    hidden, query, width, layers = 2048, 4096, 768, 24
    assert first == last
    assert first.dense == 4 * layers * ((hidden + query // 2) + (query // 2 + hidden) + (hidden + 128))
    assert first.experts == 4 * layers * 64 * (width + hidden)


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("qwen3-0.6b", ["q_pro"], "'q_pro' matches nothing here; modules end in self_attn.q_proj, self_attn.k_proj"),
        ("qwen3-0.6b", ["lm_head"], "lm_head: the output matrix is not adapted"),
        ("qwen3-0.6b", ["embed_tokens"], "embed_tokens: an embedding is a table"),
        ("qwen3-30b-a3b", ["experts.3.*"], "fits 1 of the 128 experts of layer 0: choose all experts of a layer alike"),
    ],
)
def test_targets_that_are_not_there_are_refused(model: str, flags: list[str], said: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan_of(model, "--lora-rank", "4", "--lora-target-modules", *flags)
    assert said in str(caught.value)


def test_what_a_layout_cannot_do_is_refused() -> None:
    tp16 = ("--tensor-model-parallel-size", "16", "--lora-rank", "4")
    with pytest.raises(PlanError, match="cuts the 8 key/value heads"):
        plan_of("qwen3-0.6b", *tp16, world=16)
    assert plan_of("qwen3-0.6b", *tp16, "--lora-target-modules", "o_proj", "down_proj", world=16).adapters
    shared = ("--lora-rank", "4", "--lora-dropout", "0.1", "--tensor-model-parallel-size", "2", "--sequence-parallel")
    with pytest.raises(PlanError, match=r"lora\.dropout in experts that expert_tensor_parallel_size=2 splits"):
        plan_of("qwen3-30b-a3b", *shared, world=2)
    gather = ("--lora-rank", "4", "--lora-dropout", "0.1", "--dsa-route", "gather", "--lora-target-modules")
    with pytest.raises(PlanError, match=r"lora\.dropout=0\.1 of linear_kv_up_proj drops channels of tokens"):
        plan_of("deepseek-v3-2", *gather, "kv_b_proj")
    assert plan_of("deepseek-v3-2", *gather, "q_b_proj").adapters


def test_sizes_of_the_tests_are_shipped() -> None:
    assert named("qwen3-0.6b").option == "qwen3_0_6b"


def test_the_table_of_the_model_says_all_it_said() -> None:
    """DeepSeek-V3's leaves out a further layer, aloud; adapters are one more thing that it leaves alone."""
    from loongforge.core.lora.table import OURS, without_adapters

    component = plan_of("deepseek-v3").config.model.foundation
    table = plugins.load("models", component.family).weights()(component.geometry)
    assert table.left_out_hf
    assert without_adapters(table) == replace(table, ignored_megatron=(OURS,))
