"""Refusals of layouts for encoders, experts and latent attention: what is wrong, with its value, and what to do."""

from __future__ import annotations

from typing import Any

import plan_tiny as tiny
import pytest

from loongforge.core.errors import PlanError
from loongforge.core.plan import Plan

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, EP, ETP = (
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
MIXED = tiny.EXPERTS | {"first_dense_layers": 1, "shared_ffn_hidden_size": 20}

pytestmark = pytest.mark.usefixtures("composition")


def sighted(world: int = 1, **options: Any) -> Plan:
    return Plan.of(tiny.sighted(**options), world)


def planned(world: int = 1, **options: Any) -> Plan:
    return Plan.of(tiny.run(**options), world)


REFUSALS: list[tuple[int, dict[str, Any], str]] = [
    (
        4,
        {"encoder": {TP: 3, "num_attention_heads": 12}, TP: 4},
        "model.image_encoder.tensor_model_parallel_size=3 is neither a divisor nor a multiple of tp x cp = 4 x 1 = 4, "
        "so its ranks would cut through a replica of the foundation: use [1, 2, 4].",
    ),
    (
        4,
        {"encoder": {TP: 4}, PP: 2, "enable_full_hetero_dp": True},
        "model.image_encoder.tensor_model_parallel_size=4 does not divide the 2 ranks of a pipeline stage: use [1, 2].",
    ),
    (
        2,
        {"encoder": {"num_attention_heads": 3}, TP: 2},
        "the encoder's tensor_model_parallel_size=2 does not divide image_encoder's num_attention_heads=3: set "
        "model.image_encoder.tensor_model_parallel_size to a divisor of it, for example 1.",
    ),
    (
        1,
        {"experts": tiny.EXPERTS, "latent": tiny.SHARED},
        "model.foundation: the first 2 layers add deepstack levels of the encoder and cannot hand on the keys that "
        "they chose, but layer 1 attends to those of layer 0: use an encoder with fewer levels.",
    ),
    (2, {"encoder": {"ffn_hidden_size": 71}, TP: 2}, "does not divide image_encoder's ffn_hidden_size=71"),
    (
        4,
        {"encoder": {TP: 4}, "projector": {TP: 2}, TP: 2},
        "model.image_projector.tensor_model_parallel_size=2, but it runs where the encoder does, whose size is 4: "
        "leave it out or set it to 4.",
    ),
    (
        4,
        {"encoder": {"data_parallel_size": 3}, TP: 2},
        "model.image_encoder.data_parallel_size=3, but 2 copies follow from the layout (inline tp2 dp2): leave it out "
        "or set it to 2.",
    ),
    (
        4,
        {"foundation": {"data_parallel_size": 4}, TP: 2},
        "model.foundation.data_parallel_size=4, but 2 follows from 4 ranks: leave it out or set it to 2.",
    ),
    (
        2,
        {"enable_encoder_hetero_dp": True, "enable_full_hetero_dp": True},
        "parallel.enable_encoder_hetero_dp and enable_full_hetero_dp place the encoder differently: choose one.",
    ),
    (
        2,
        {"enable_full_hetero_dp": True, "encoder_ranks": 1},
        "parallel.enable_full_hetero_dp and encoder_ranks place the encoder differently: choose one.",
    ),
    (
        2,
        {"enable_encoder_hetero_dp": True, "encoder": {TP: 2}, TP: 2},
        "model.image_encoder.tensor_model_parallel_size=2 contradicts enable_encoder_hetero_dp, which makes whole "
        "copies of the encoder: set it to 1, or drop the flag.",
    ),
    (
        1,
        {"full_hetero_dp_cpu_offload": True},
        "parallel.full_hetero_dp_cpu_offload=True keeps features that wait for the pipeline, but only "
        "enable_full_hetero_dp lets them wait: turn it on, or drop the offload.",
    ),
    (
        2,
        {"encoder": {CP: 2}},
        "model.image_encoder.context_parallel_size=2 cannot be had, whole images are spread over ranks, never parts of "
        "one: leave it out or set it to 1.",
    ),
    (
        2,
        {"projector": {PP: 2}},
        "model.image_projector.pipeline_model_parallel_size=2 cannot be had, an encoder has no stages: leave it out or "
        "set it to 1.",
    ),
    (
        2,
        {"encoder": {"sequence_parallel": True}, TP: 2},
        "model.image_encoder.sequence_parallel=True cannot be had, images of any length would have to split evenly: "
        "leave it out.",
    ),
    (
        2,
        {"encoder_ranks": 2},
        "world=2 leaves no rank to the foundation beside encoder_ranks=2: use at least 3 ranks, or fewer "
        "encoder_ranks.",
    ),
    (
        6,
        {"encoder_ranks": 1, TP: 2},
        "world=6 - encoder_ranks=1 is not a multiple of tp x pp x cp = 2 x 1 x 1 = 2: use 5 ranks, or make the axes "
        "smaller.",
    ),
    (
        5,
        {"encoder_ranks": 1, TP: 2, "encoder": {TP: 2}},
        "model.image_encoder.tensor_model_parallel_size=2 does not divide encoder_ranks=1: use [1].",
    ),
    (
        3,
        {"encoder_ranks": 1, CP: 2},
        "parallel.encoder_ranks=1 with context_parallel_size=2: megatron-core's bridge between encoder and foundation "
        "carries whole sequences only; set context_parallel_size to 1, or encoder_ranks to 0 with "
        "enable_full_hetero_dp.",
    ),
    (
        3,
        {"encoder_ranks": 1, PP: 2, VPP: 2, "global_batch_size": 4},
        "parallel.encoder_ranks=1 with virtual_pipeline_model_parallel_size=2: a foundation on ranks of its own is not "
        "interleaved; drop the virtual stages.",
    ),
    (
        5,
        {"encoder_ranks": 2},
        "the encoder's 2 copies (tp 1) on encoder_ranks=2 cannot serve the foundation's 3: there must be one for "
        "each. Use encoder_ranks=3, or another model.image_encoder.tensor_model_parallel_size.",
    ),
    (
        4,
        {PP: 4, "num_layers": 4},
        "the encoder hands features to the first 2 layers of the foundation, but the first pipeline chunk has 1: use "
        "fewer stages or virtual stages.",
    ),
    (
        1,
        {"encoder": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3}},
        "model.image_encoder.recompute_num_layers=3: deepstack layers [0, 1] (from 0) lie inside a recomputed group",
    ),
    (
        1,
        {"encoder": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 4}},
        "model.image_encoder.recompute_num_layers=4 is more than the 3 layers of the encoder: use 1 to 3.",
    ),
    (
        1,
        {"encoder": {"recompute_granularity": "selective", "recompute_modules": ("moe",)}},
        "model.image_encoder.recompute_modules=['moe'] cannot be recomputed in an encoder: choose among core_attn, "
        "layernorm, mlp.",
    ),
    (
        1,
        {"encoder": {"freeze": True}, "projector": {"freeze": True}, "freeze": True},
        "model.foundation.freeze=True and model.image_projector.freeze=True and model.image_encoder.freeze=True leave "
        "nothing to train: freeze less, or set lr to 0.",
    ),
    (1, {"projector": {"lr_mult": 0.0}}, "model.image_projector.lr_mult must be above 0, got 0.0"),
    (1, {"projector": {"input_size": 40}}, "states input_size=40"),
]


@pytest.mark.parametrize(("world", "options", "sentence"), REFUSALS)
def test_refusal(world: int, options: dict[str, Any], sentence: str):
    with pytest.raises(PlanError) as refused:
        sighted(world, **options)
    assert sentence in str(refused.value)


ALONE: list[tuple[int, dict[str, Any], str]] = [
    (
        1,
        {"enable_full_hetero_dp": True},
        "parallel.enable_full_hetero_dp=True speaks of an encoder, but the model has none: leave it out.",
    ),
    (2, {"encoder_ranks": 1}, "parallel.encoder_ranks=1 speaks of an encoder, but the model has none: leave it out."),
    (
        8,
        {EP: 8, "experts": tiny.EXPERTS},
        "parallel.expert_model_parallel_size=8 does not divide num_experts=12: use [1, 2, 3, 4, 6, 12].",
    ),
    (
        4,
        {EP: 3, "experts": tiny.EXPERTS},
        "parallel.expert_model_parallel_size=3 x expert_tensor_parallel_size=1 does not divide the 4 ranks of a "
        "pipeline stage: use an expert_model_parallel_size among [1, 2, 4].",
    ),
    (
        2,
        {EP: 2, TP: 2, "sequence_parallel": True, "experts": tiny.EXPERTS},
        "parallel.expert_model_parallel_size=2 x expert_tensor_parallel_size=2 does not divide the 2 ranks of a "
        "pipeline stage: use an expert_model_parallel_size among [1], or --expert-tensor-parallel-size 1.",
    ),
    (
        4,
        {ETP: 2, "experts": tiny.EXPERTS},
        "parallel.expert_tensor_parallel_size=2 is neither 1 nor tensor_model_parallel_size=1: use one of the two.",
    ),
    (
        2,
        {TP: 2, "experts": tiny.EXPERTS},
        "experts with tensor_model_parallel_size=2 need sequence_parallel (megatron-core refuses to route the same "
        "tokens on every tensor parallel rank): turn it on.",
    ),
    (
        2,
        {TP: 2, "sequence_parallel": True, "experts": tiny.EXPERTS | {"ffn_hidden_size": 33}},
        "parallel.expert_tensor_parallel_size=2 does not divide an expert's ffn_hidden_size=33: use "
        "--expert-tensor-parallel-size 1.",
    ),
    (
        2,
        {TP: 2, ETP: 1, "sequence_parallel": True, "experts": tiny.EXPERTS | {"shared_ffn_hidden_size": 33}},
        "parallel.tensor_model_parallel_size=2 does not divide shared_ffn_hidden_size=33: use a tensor parallel size "
        "that does.",
    ),
    (
        1,
        {"experts": tiny.EXPERTS | {"first_dense_layers": 9}},
        "model.foundation: first_dense_layers=9 is more than num_layers=8: lower it.",
    ),
    (
        2,
        {TP: 2, "latent": tiny.LATENT},
        "latent attention with tensor_model_parallel_size=2 gets wrong gradients without sequence_parallel: turn it "
        "on.",
    ),
    (
        3,
        {TP: 3, "sequence_parallel": True, "seq_length": 126, "latent": tiny.LATENT},
        "parallel.tensor_model_parallel_size=3 does not divide num_attention_heads=8: use [1, 2, 4, 8].",
    ),
    (
        1,
        {"experts": tiny.EXPERTS, "latent": tiny.TAUGHT, "freeze": True},
        "model.foundation: dsa_indexer_loss_coeff=0.5 teaches an indexer that does not train here: set it to 0, or "
        "train the foundation whole.",
    ),
    (
        1,
        {"experts": tiny.EXPERTS, "latent": tiny.LATENT | {"index": tiny.SPARSE["index"] | {"warmup": True}}},
        "model.foundation: dsa_indexer_warmup=True trains indexers alone, and dsa_indexer_loss_coeff=0 leaves them "
        "nothing to learn from: set it to 1.",
    ),
    (
        1,
        {"experts": tiny.EXPERTS, "latent": tiny.LATENT | {"index": tiny.WARMED["index"] | {"route": "masked"}}},
        "model.foundation: dsa_route='masked' is about chosen keys, and dsa_indexer_warmup=True attends to every key: "
        "leave one of them out.",
    ),
    (
        1,
        {"experts": tiny.EXPERTS, "latent": tiny.LATENT | {"index": tiny.WARMED["index"] | {"fp8": True}}},
        "model.foundation: dsa_indexer_fp8=True is about the choice of keys, and dsa_indexer_warmup=True chooses none: "
        "leave one of them out.",
    ),
    (
        4,
        {PP: 4, "experts": tiny.EXPERTS, "latent": tiny.SHARED, "global_batch_size": 4},
        "pipeline stage 2 has a chunk that begins with layer 4 (from 0), which attends to the keys that layer 2 chose, "
        "and the choice stays within a chunk: use fewer pipeline stages, without virtual ones.",
    ),
    (
        2,
        {PP: 2, "experts": tiny.EXPERTS, "latent": tiny.SHARED},
        "pipeline stage 1 has a chunk that begins with layer 4 (from 0), which attends to the keys that layer 2 chose, "
        "and the choice stays within a chunk: use for example --decoder-first-pipeline-num-layers 2.",
    ),
    (
        2,
        {PP: 2, VPP: 2, "experts": tiny.EXPERTS, "latent": tiny.SHARED, "global_batch_size": 2},
        "pipeline stage 0 has a chunk that begins with layer 4 (from 0), which attends to the keys that layer 2 chose",
    ),
    (
        1,
        {"experts": tiny.EXPERTS, "latent": tiny.LATENT | {"index": tiny.SPARSE["index"] | {"shared_layers": (0, 3)}}},
        "model.foundation: layers [0] cannot attend to the keys of the layer before them, only layers 1 to 7 can: "
        "correct them.",
    ),
    (
        2,
        {TP: 2, "delta": tiny.DELTA},
        "a gated delta rule with tensor_model_parallel_size=2 needs sequence_parallel, by which the gradient of its "
        "head norm is summed over ranks: turn it on.",
    ),
    (
        2,
        {CP: 2, "delta": tiny.DELTA},
        "parallel.context_parallel_size=2 splits sequences, which the gated delta rule reads as one recurrence: set it "
        "to 1 and use tensor or pipeline parallelism instead.",
    ),
    (
        8,
        {TP: 8, "sequence_parallel": True, "delta": tiny.DELTA},
        "parallel.tensor_model_parallel_size=8 does not divide the 4 key heads of the gated delta rule: use [1, 2, 4].",
    ),
    (
        1,
        {"delta": tiny.DELTA | {"num_value_heads": 6}},
        "model.foundation: num_value_heads=6 is not a multiple of num_key_heads=4: correct one of the two.",
    ),
    (
        1,
        {"delta": tiny.DELTA | {"layers": (0, 8)}},
        "model.foundation: delta layers [8] are none of the 8 layers, which are numbered from 0: correct them.",
    ),
    (
        1,
        {
            "recompute_granularity": "selective",
            "recompute_modules": ("mlp", "shared_experts"),
            "experts": tiny.EXPERTS,
        },
        "parallel.recompute_modules=['mlp', 'shared_experts'] cannot be recomputed in this model: choose among "
        "core_attn, layernorm, moe.",
    ),
]


@pytest.mark.parametrize(("world", "options", "sentence"), ALONE)
def test_refusal_of_a_foundation(world: int, options: dict[str, Any], sentence: str):
    with pytest.raises(PlanError) as refused:
        planned(world, **options)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (4, {EP: 4, "experts": tiny.EXPERTS}),
        (4, {EP: 2, TP: 2, ETP: 1, "sequence_parallel": True, "experts": MIXED, "latent": tiny.LATENT}),
        (4, {EP: 2, TP: 2, "sequence_parallel": True, "experts": tiny.EXPERTS}),
        (4, {EP: 2, CP: 2, PP: 2, "experts": tiny.EXPERTS}),
        (
            1,
            {
                "recompute_granularity": "selective",
                "recompute_modules": ("mlp", "moe", "shared_experts", "mla_up_proj"),
                "experts": MIXED,
                "latent": tiny.LATENT,
            },
        ),
    ],
)
def test_foundations_that_can_run(world: int, options: dict[str, Any]):
    assert planned(world, **options).layout.world == world


def test_a_projector_may_repeat_the_layout_of_its_encoder():
    plan = sighted(4, **{TP: 2, "projector": {TP: 2, "data_parallel_size": 2}})
    assert (plan.encoder and plan.encoder.dp) == 2


def test_every_problem_of_an_encoder_comes_at_once():
    with pytest.raises(PlanError) as refused:
        sighted(2, encoder={CP: 2, "sequence_parallel": True, "data_parallel_size": 7}, projector={"output_size": 9})
    assert [problem.split("=")[0] for problem in refused.value.problems] == [
        "model.image_encoder.context_parallel_size",
        "model.image_encoder.sequence_parallel",
        "model.image_encoder.data_parallel_size",
        "model.image_projector (tiny_projector) states output_size",
    ]


def test_two_components_may_be_frozen():
    sighted(encoder={"freeze": True}, freeze=True)
