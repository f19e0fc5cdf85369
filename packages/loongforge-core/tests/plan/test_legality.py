"""Every refusal: what is wrong, with its value, and what to do."""

from __future__ import annotations

from typing import Any

import plan_tiny as tiny
import pytest

from loongforge.core.errors import PlanError
from loongforge.core.plan import Plan

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
FULL = {"recompute_granularity": "full"}

REFUSALS: list[tuple[int, dict[str, Any], str]] = [
    (0, {}, "world=0 must be at least 1: start at least one worker."),
    (
        6,
        {TP: 2, PP: 2},
        "world=6 is not a multiple of tp x pp x cp = 2 x 2 x 1 = 4: use 4 ranks, or make the axes smaller.",
    ),
    (2, {PP: 4}, "use 4 ranks"),
    (
        4,
        {"global_batch_size": 10, "micro_batch_size": 2},
        "train.global_batch_size=10 is not a multiple of micro_batch_size x dp = 2 x 4 = 8: use 8, or change "
        "micro_batch_size.",
    ),
    (
        1,
        {"train_iters": None},
        "train.train_iters and train.train_samples are both unset: give one, for example --train-iters 1000.",
    ),
    (
        1,
        {"train_samples": 3, "global_batch_size": 4},
        "train.train_samples=3 is less than one global batch of 4: ask for more samples or use a smaller "
        "global_batch_size.",
    ),
    (
        1,
        {"lr_warmup_iters": 10},
        "optimizer.lr_warmup_iters=10 leaves no step to decay in 10 decay steps: warm up for fewer steps, or raise "
        "lr_decay_iters or train_iters.",
    ),
    (1, {"lr_warmup_init": 1.0}, "optimizer.lr_warmup_init=1.0 is above lr=0.0001: begin the warm-up lower."),
    (1, {"lr_decay_style": "WSD"}, "optimizer.lr_decay_style='WSD' needs lr_wsd_decay_iters"),
    (
        1,
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 11},
        "optimizer.lr_wsd_decay_iters=11 is longer than the whole decay of 10 steps",
    ),
    (1, {"start_weight_decay": 0.1, "end_weight_decay": 0.0}, "optimizer: weight decay cannot shrink from 0.1 to 0.0"),
    (
        1,
        {"start_weight_decay": 0.0, "end_weight_decay": 0.1},
        "optimizer: weight decay grows from 0.0 to 0.1 but weight_decay_incr_style is 'constant'",
    ),
    (1, {"lr_warmup_fraction": 1.0}, "optimizer.lr_warmup_fraction=1.0 leaves no step to decay in 10 decay steps"),
    (
        1,
        {"num_query_groups": 3},
        "num_attention_heads=8 is not a multiple of num_query_groups=3: correct one of the two.",
    ),
    (3, {TP: 3}, "parallel.tensor_model_parallel_size=3 does not divide num_attention_heads=8: use [1, 2, 4, 8]."),
    (3, {TP: 3}, "parallel.tensor_model_parallel_size=3 does not divide ffn_hidden_size=160"),
    (
        4,
        {TP: 4, "num_attention_heads": 12, "num_query_groups": 6},
        "parallel.tensor_model_parallel_size=4 is neither a divisor nor a multiple of num_query_groups=6, so key/value "
        "heads can be neither split nor replicated: use [1, 2, 3, 6, 12].",
    ),
    (
        8,
        {TP: 8, "num_query_groups": 1, "kv_channels": 2},
        "parallel.tensor_model_parallel_size=8 does not divide the 20 rows of the fused QKV matrix: use a smaller one.",
    ),
    (1, {"freeze": True}, "model.foundation.freeze=True leaves nothing to train: freeze less, or set lr to 0."),
    (
        1,
        {"sequence_parallel": True},
        "parallel.sequence_parallel=True needs tensor parallel ranks to split over, but tensor_model_parallel_size=1: "
        "raise it or drop sequence_parallel.",
    ),
    (
        2,
        {CP: 2, "seq_length": 126},
        "train.seq_length=126 is not a multiple of 2 x context_parallel_size = 4 (each rank holds one early and one "
        "late slice): use 128.",
    ),
    (
        4,
        {TP: 4, "sequence_parallel": True, "seq_length": 126},
        "train.seq_length=126 cannot be split for sequence_parallel: 126 tokens per context parallel rank over tp=4: "
        "use 128.",
    ),
    (
        1,
        {"rotary_limit": 64},
        "train.seq_length=128 is more than the 64 tokens up to which this model's rotary positions are the plain ones: "
        "use at most 64, or train it without the stretch (rope_scaling null in config.json, "
        "model.foundation.dynamic_rope_factor=null).",
    ),
    (
        1,
        {VPP: 2},
        "parallel.virtual_pipeline_model_parallel_size=2 interleaves pipeline stages, but "
        "pipeline_model_parallel_size=1: raise it or drop the virtual stages.",
    ),
    (
        3,
        {PP: 3},
        "num_layers=8 is not a multiple of pipeline stages x virtual stages = 3 x 1 = 3: use a product among "
        "[1, 2, 4, 8], or give the first or the last stage another number of layers with "
        "--decoder-first-pipeline-num-layers or --decoder-last-pipeline-num-layers.",
    ),
    (2, {PP: 2, VPP: 3, "global_batch_size": 2}, "pipeline stages x virtual stages = 2 x 3 = 6"),
    (
        2,
        {PP: 2, VPP: 2, "global_batch_size": 3},
        "the interleaved pipeline needs a multiple of 2 micro-batches, but global_batch_size=3 gives 3: use "
        "global_batch_size=4, or drop virtual_pipeline_model_parallel_size.",
    ),
    (
        2,
        {"overlap_param_gather": True},
        "parallel.overlap_param_gather=True needs use_distributed_optimizer and overlap_grad_reduce: turn on, or drop "
        "the overlap.",
    ),
    (
        2,
        {"overlap_param_gather": True, "use_distributed_optimizer": True},
        "parallel.overlap_param_gather=True needs overlap_grad_reduce: turn on, or drop the overlap.",
    ),
    (
        1,
        FULL,
        "parallel.recompute_granularity='full' needs recompute_method ('uniform' or 'block', got None) and "
        "recompute_num_layers (1 to 8, got None): give both, for example uniform and 1.",
    ),
    (
        2,
        FULL | {PP: 2, "recompute_method": "block", "recompute_num_layers": 5},
        "parallel.recompute_num_layers=5 is more than the 4 layers of a model chunk: use 1 to 4.",
    ),
    (
        1,
        {"recompute_granularity": "selective", "recompute_num_layers": 1},
        "parallel.recompute_method=None and recompute_num_layers=1 belong to recompute_granularity='full', not "
        "'selective': set it to 'full' or drop them.",
    ),
    (
        1,
        {"recompute_granularity": "selective", "recompute_modules": ("mlp", "moe_act")},
        "parallel.recompute_modules=['mlp', 'moe_act'] cannot be recomputed in a dense model: choose among core_attn, "
        "layernorm, mlp.",
    ),
    (1, {"recompute_granularity": "selective", "recompute_modules": ()}, "choose among core_attn, layernorm, mlp."),
    (
        1,
        {"recompute_modules": ("mlp",)},
        "parallel.recompute_modules=['mlp'] belongs to recompute_granularity='selective', not None: set it to "
        "'selective' or drop the modules.",
    ),
    (
        2,
        {"expert_model_parallel_size": 2},
        "parallel.expert_model_parallel_size=2 needs experts, but the model is dense: set it to 1.",
    ),
    (
        2,
        {"expert_tensor_parallel_size": 2},
        "parallel.expert_tensor_parallel_size=2 differs from tensor_model_parallel_size=1, but the model has no "
        "experts: leave it out.",
    ),
]


@pytest.mark.parametrize(("world", "options", "sentence"), REFUSALS)
def test_refusal(world: int, options: dict[str, Any], sentence: str):
    with pytest.raises(PlanError) as refused:
        Plan.of(tiny.run(**options), world)
    assert sentence in str(refused.value)


def test_all_problems_come_at_once():
    options = {"global_batch_size": 3, "sequence_parallel": True, "overlap_param_gather": True, "train_iters": None}
    with pytest.raises(PlanError) as refused:
        Plan.of(tiny.run(**options), 2)
    assert [line.split("=")[0].split()[0] for line in str(refused.value).splitlines()] == [
        "train.global_batch_size",
        "train.train_iters",
        "parallel.sequence_parallel",
        "parallel.overlap_param_gather",
    ]


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, {}),
        (16, {TP: 2, PP: 2, CP: 2, "sequence_parallel": True}),
        (2, {PP: 2, VPP: 2, "global_batch_size": 4}),
        (2, {PP: 2, "tie_word_embeddings": True}),
        (8, {TP: 8, "num_query_groups": 4}),
        (2, {"overlap_param_gather": True, "use_distributed_optimizer": True, "overlap_grad_reduce": True}),
        (1, FULL | {"recompute_method": "uniform", "recompute_num_layers": 3}),
        (1, {"recompute_granularity": "selective", "recompute_modules": ("mlp", "layernorm")}),
        (1, {"freeze": True, "lr": 0.0}),
        (2, {TP: 2, "expert_tensor_parallel_size": 2}),
        (1, {"lr_warmup_iters": 10, "lr_decay_iters": 11}),
        (1, {"rotary_limit": 128}),
    ],
)
def test_what_can_run_is_not_refused(world: int, options: dict[str, Any]):
    assert Plan.of(tiny.run(**options), world).layout.world == world


@pytest.mark.parametrize("remedy", ["global_batch_size", "seq_length"])
def test_the_remedy_heals(remedy: str):
    """The number a refusal proposes is itself legal."""
    ill = {"global_batch_size": 3} if remedy == "global_batch_size" else {"seq_length": 126, CP: 2}
    healthy = {"global_batch_size": 4} if remedy == "global_batch_size" else {"seq_length": 128, CP: 2}
    layout = {PP: 2, VPP: 2} if remedy == "global_batch_size" else {}
    with pytest.raises(PlanError, match=f"use (global_batch_size=)?{next(iter(healthy.values()))}"):
        Plan.of(tiny.run(**layout, **ill), 2)
    Plan.of(tiny.run(**layout, **healthy), 2)
