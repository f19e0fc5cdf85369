"""Derived numbers: against hand arithmetic, the reference implementation, and what a real model holds and keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import plan_tiny as tiny
import pytest

from loongforge.core.plan import Plan, count_parameters, report, stage_parameters
from loongforge.core.plan.compute import flops_per_token, pipeline_bubble
from loongforge.core.plan.memory import LOSS_BLOCK_BYTES, chunks_in_flight, stage_memory
from loongforge.core.plan.traffic import traffic

HERE = Path(__file__).parent

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
MIXED = tiny.EXPERTS | {"first_dense_layers": 1, "shared_ffn_hidden_size": 20}


def planned(world: int = 1, **options: Any) -> Plan:
    return Plan.of(tiny.run(**options), world)


def test_derived_sizes():
    plan = planned(8, **{TP: 2, "train_samples": 100, "global_batch_size": 16, "micro_batch_size": 2})
    assert (plan.layout.dp, plan.num_microbatches, plan.train_iters) == (4, 2, 6)
    assert plan.tokens_per_step == 16 * 128
    assert report(plan).notes[0] == "the last 4 of train_samples=100 do not fill a global batch and are left out."


def test_batch_is_one_micro_batch_per_rank_when_unset():
    assert planned(4, micro_batch_size=3).global_batch_size == 12


@pytest.mark.parametrize(("tp", "multiple", "rows"), [(1, 1, 131), (2, 1, 132), (2, 64, 256), (4, 8, 160)])
def test_padded_vocabulary(tp: int, multiple: int, rows: int):
    assert planned(tp, **{TP: tp, "make_vocab_size_divisible_by": multiple}).padded_vocab_size == rows


def test_one_virtual_stage_is_none():
    assert planned(2, **{PP: 2, VPP: 1}).layout.vpp is None


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_qwen3_are_the_references(tied: bool):
    transformers = pytest.importorskip("transformers")
    sizes = tiny.SIZES
    config = transformers.Qwen3Config(
        num_hidden_layers=sizes["num_layers"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"],
        head_dim=sizes["kv_channels"],
        vocab_size=sizes["vocab_size"],
        tie_word_embeddings=tied,
    )
    plan = planned(tie_word_embeddings=tied)
    assert (
        count_parameters(plan.geometry, sizes["vocab_size"]) == transformers.Qwen3ForCausalLM(config).num_parameters()
    )


def test_parameters_with_a_bias_are_the_references():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        num_hidden_layers=8,
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=131,
        tie_word_embeddings=False,
    )
    shape = {"num_attention_heads": 4, "num_query_groups": 2, "add_qkv_bias": True, "qk_layernorm": False}
    plan = planned(tie_word_embeddings=False, **shape)
    assert count_parameters(plan.geometry, 131) == transformers.Qwen2ForCausalLM(config).num_parameters()


MEASURED: list[tuple[int, dict[str, Any]]] = [
    (1, {"precision": "fp32", "micro_batch_size": 2}),
    (2, {TP: 2, "sequence_parallel": True}),
    (2, {CP: 2, "recompute_granularity": "selective", "recompute_modules": ["mlp", "layernorm"]}),
    (4, {TP: 2, PP: 2, VPP: 2, "global_batch_size": 2}),
    (2, {TP: 2, EP: 2, ETP: 1, "sequence_parallel": True, "experts": MIXED, "latent": tiny.LATENT}),
    (2, {TP: 2, EP: 2, ETP: 1, "sequence_parallel": True, "experts": MIXED, "latent": tiny.TAUGHT}),
    (2, {CP: 2, "experts": MIXED, "latent": tiny.SHARED, "prediction_layers": 1}),
    (2, {CP: 2, "experts": MIXED, "latent": tiny.GATHERED}),
    (2, {CP: 2, "latent": tiny.LATENT}),
    (2, {PP: 2, "experts": MIXED}),
    (2, {TP: 2, "sequence_parallel": True, "prediction_layers": 2, "experts": MIXED, EP: 2, ETP: 1}),
    (2, {PP: 2, "prediction_layers": 1, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("world", "options"), MEASURED)
def test_a_real_model_holds_and_keeps_what_the_plan_says(world: int, options: dict[str, Any]):
    """Parameters of every rank exactly. Activations within 3%: what is left are masks of the loss and index tensors,
    and experts that are not loaded evenly.

    The plan counts a block of logits too, which exists for a moment.
    """
    command = [sys.executable, str(HERE / "measure.py"), str(world), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    decoder, answers = json.JSONDecoder(), []
    text = done.stdout.strip()
    while text:
        answer, end = decoder.raw_decode(text)
        answers.append(answer)
        text = text[end:].strip()
    plan = planned(world, **options)
    held, memory = stage_parameters(plan.geometry, plan.padded_vocab_size, plan.layout), stage_memory(plan)
    assert len(answers) == world
    for answer in answers:
        assert answer["parameters"] == held[answer["stage"]]
        if answer["kept"] is not None:
            element = 4 if plan.config.train.precision == "fp32" else 2
            tokens = plan.micro_batch_size * plan.seq_length // plan.layout.cp
            logits = tokens * plan.padded_vocab_size // plan.layout.tp * element
            assert memory[0].activations - logits == pytest.approx(answer["kept"], rel=0.03)


def test_state_of_mixed_precision_is_16_bytes_and_zero1_divides_12_of_them():
    plain = stage_memory(planned(4))[0]
    held = stage_parameters(planned(4).geometry, 131, planned(4).layout)[0]
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * held, 4 * held, 12 * held)
    sharded = stage_memory(planned(4, **{CP: 2, "use_distributed_optimizer": True}))[0]
    assert sharded.optimizer == 12 * held // 4


def test_state_of_other_precisions():
    held = stage_parameters(planned().geometry, 131, planned().layout)[0]
    full = stage_memory(planned(precision="fp32"))[0]
    assert (full.weights, full.gradients, full.optimizer) == (4 * held, 4 * held, 8 * held)
    low = stage_memory(planned(grad_reduce_in_fp32=False))[0]
    assert (low.weights, low.gradients, low.optimizer) == (2 * held, 2 * held, 16 * held)
    frozen = stage_memory(planned(freeze=True, lr=0.0))[0]
    assert (frozen.gradients, frozen.optimizer) == (0, 0)


def test_logits_are_counted_by_the_block_that_the_loss_has():
    from loongforge.kernels.linear_cross_entropy.blocks import ACCELERATOR_BLOCK_BYTES

    def last(vocab: int, **options: Any) -> int:
        tied = {"tie_word_embeddings": True, "vocab_size": vocab, "seq_length": 4096}
        return stage_memory(planned(**tied, **options))[0].activations

    assert LOSS_BLOCK_BYTES == ACCELERATOR_BLOCK_BYTES
    small, large = 2**16, 2**18  # half a block in bf16, and two
    whole, block = 4096 * small * 2, ACCELERATOR_BLOCK_BYTES
    assert last(large) - last(small) == (block - whole) + 64 * (large * 4 - small * 2)  # its gradient is summed in fp32
    assert last(large, freeze=True, lr=0.0) - last(small, freeze=True, lr=0.0) == block - whole


def test_recompute_trades_memory():
    def kept(**options: Any) -> int:
        return stage_memory(planned(**options))[0].activations

    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    block = full | {"recompute_method": "block"}
    selective = {"recompute_granularity": "selective", "recompute_modules": ("mlp",)}
    assert kept(**full) < kept(**selective) < kept()
    assert kept(**full) < kept(**block)


def test_chunks_in_flight_follow_the_schedule():
    pipeline = planned(4, **{PP: 4, "global_batch_size": 8})
    assert [chunks_in_flight(pipeline, stage) for stage in range(4)] == [4, 3, 2, 1]
    short = planned(4, **{PP: 4, "global_batch_size": 2})
    assert [chunks_in_flight(short, stage) for stage in range(4)] == [2, 2, 2, 1]
    interleaved = planned(4, **{PP: 4, VPP: 2, "global_batch_size": 8})
    assert [chunks_in_flight(interleaved, stage) for stage in range(4)] == [11, 9, 7, 5]


def test_bubble():
    assert pipeline_bubble(planned()) == 0
    assert pipeline_bubble(planned(4, **{PP: 4, "global_batch_size": 8})) == 3 / 8
    assert pipeline_bubble(planned(4, **{PP: 4, VPP: 2, "global_batch_size": 8})) == 3 / 16


def test_flops_are_six_per_matrix_weight_and_causal_attention():
    plan = planned(num_layers=1, num_attention_heads=2, num_query_groups=2, hidden_size=32, ffn_hidden_size=64)
    weights = 4 * 32 * 32 + 3 * 32 * 64 + 131 * 32
    causal = 2 * 2 * 32 * 128 // 2 * 3
    assert flops_per_token(plan) == 6 * weights + causal


HIDDEN = 128 * 64 * 2  # bytes of one sequence's hidden states


def test_traffic_of_tensor_parallelism():
    """Eight layers with four all-reduces each, one for the embedding and one for the output, all over two ranks."""
    assert traffic(planned(2, **{TP: 2})).tensor == (8 * 4 + 2) * 2 * HIDDEN // 2
    split = traffic(planned(2, **{TP: 2, "sequence_parallel": True})).tensor
    assert split == (8 * 2 * 5 + 4) * HIDDEN // 2  # the output layer gathers its input once alone
    again = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert traffic(planned(2, **{TP: 2} | again)).tensor == (8 * 6 + 2) * 2 * HIDDEN // 2


def test_traffic_of_the_other_axes():
    held = stage_parameters(planned().geometry, 131, planned().layout)[0]
    assert traffic(planned(4)).data == round(2 * 3 / 4 * 4 * held)
    assert traffic(planned(4, use_distributed_optimizer=True)).data == round(3 / 4 * (4 + 2) * held)
    assert traffic(planned(2, **{PP: 2, "global_batch_size": 3})).pipeline == 3 * HIDDEN
    assert traffic(planned(4, **{PP: 4, VPP: 2, "global_batch_size": 4})).pipeline == 4 * 4 * HIDDEN
    assert traffic(planned(2, **{PP: 2})).embedding == 131 * 64 * 4
    assert traffic(planned(2, **{PP: 2, "tie_word_embeddings": False})).embedding == 0
    assert traffic(planned(2, **{CP: 2})).context == 8 * 2 * (2 * 128 * 4 * 16 * 2) // 2
    assert traffic(planned()).total == 0


def test_notes():
    notes = report(planned(2, seq_length=8192, freeze_parameters=("embedding",))).notes
    assert notes[0] == "seq_length=8192 is more than the 4096 positions the model was made for."
    assert notes[1] == "freeze_parameters is not known here: gradients and optimizer count every parameter."
    assert notes[2].startswith("use_distributed_optimizer would save 0.00 GiB")


def test_note_on_tensor_parallel_experts():
    options = {TP: 2, "sequence_parallel": True, "experts": tiny.EXPERTS}
    note = "expert_tensor_parallel_size=2 (as tensor_model_parallel_size when unset) hands every token to 2 ranks"
    assert any(one.startswith(note) for one in report(planned(2, **options)).notes)
    assert not any(one.startswith("expert_") for one in report(planned(2, **options | {ETP: 1})).notes)


def test_json_is_plain():
    data = report(planned(4, **{PP: 2})).as_json()
    assert json.loads(json.dumps(data))["world"] == 4
    assert data["components"][0]["axes"] == {"tp": 1, "cp": 1, "dp": 2, "pp": 2, "vpp": 1, "ep": 1}
    assert data["peak_bytes"] == max(stage["total"] for stage in data["components"][0]["memory"])
