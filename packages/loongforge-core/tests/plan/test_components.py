"""Plans of composed models: layouts, parameters against the references, arithmetic, memory, traffic."""

from __future__ import annotations

from typing import Any

import plan_tiny as tiny
import pytest

from loongforge.core.model.geometry import EncoderGeometry, ExpertGeometry, LatentGeometry, ProjectorGeometry
from loongforge.core.plan import EncoderLayout, Plan, count_parameters, report, stage_parameters
from loongforge.core.plan.compute import encoder_flops, flops_per_token
from loongforge.core.plan.encoder_memory import encoder_memory, features_in_flight, projector_memory, waiting_bytes
from loongforge.core.plan.images import ImageBudget
from loongforge.core.plan.memory import stage_memory
from loongforge.core.plan.parameters import stage_held, stage_layers
from loongforge.core.plan.towers import encoder_elements, projector_elements
from loongforge.core.plan.traffic import traffic

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VPP, EP = "virtual_pipeline_model_parallel_size", "expert_model_parallel_size"
MIXED = tiny.EXPERTS | {"first_dense_layers": 1, "shared_ffn_hidden_size": 20}

pytestmark = pytest.mark.usefixtures("composition")


def sighted(world: int = 1, **options: Any) -> Plan:
    return Plan.of(tiny.sighted(**options), world)


def planned(world: int = 1, **options: Any) -> Plan:
    return Plan.of(tiny.run(**options), world)


LAYOUTS: list[tuple[int, dict[str, Any], EncoderLayout, int]] = [
    (1, {}, EncoderLayout(mode="inline", tp=1, dp=1), 1),
    (8, {TP: 2, PP: 2}, EncoderLayout(mode="inline", tp=2, dp=2), 8),
    (8, {TP: 2, PP: 2, "enable_encoder_hetero_dp": True}, EncoderLayout(mode="inline", tp=1, dp=4), 8),
    (8, {TP: 2, CP: 2, "encoder": {TP: 4}}, EncoderLayout(mode="inline", tp=4, dp=2), 8),
    (8, {TP: 2, "encoder": {TP: 4}}, EncoderLayout(mode="inline", tp=4, dp=2), 8),
    (8, {TP: 2, PP: 2, "enable_full_hetero_dp": True}, EncoderLayout(mode="ahead", tp=1, dp=8), 8),
    (
        8,
        {TP: 2, PP: 2, "enable_full_hetero_dp": True, "encoder": {TP: 2}},
        EncoderLayout(mode="ahead", tp=2, dp=4),
        8,
    ),
    (6, {TP: 2, "encoder_ranks": 2}, EncoderLayout(mode="apart", tp=1, dp=2), 4),
    (4, {TP: 2, "encoder_ranks": 2}, EncoderLayout(mode="apart", tp=2, dp=1), 2),
    (3, {TP: 2, "encoder_ranks": 1, "encoder": {TP: 1}}, EncoderLayout(mode="apart", tp=1, dp=1), 2),
]


@pytest.mark.parametrize(("world", "options", "encoder", "foundation"), LAYOUTS)
def test_layouts(world: int, options: dict[str, Any], encoder: EncoderLayout, foundation: int):
    plan = sighted(world, **options)
    assert (plan.encoder, plan.layout.world, plan.world) == (encoder, foundation, world)


def test_a_foundation_alone_has_no_encoder():
    plan = planned(2)
    assert (plan.encoder, plan.encoder_geometry, plan.projector_geometry) == (None, None, None)
    assert report(plan).modes == ()
    assert report(plan).advice is None


def test_sizes_of_the_projector_come_from_its_neighbours():
    shape = sighted().projector_geometry
    assert shape is not None
    assert (shape.input_size, shape.output_size) == (48, 64)


def test_parameters_of_experts_are_the_references():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        num_hidden_layers=8,
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        vocab_size=131,
        num_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        tie_word_embeddings=False,
    )
    plan = planned(experts=tiny.EXPERTS, tie_word_embeddings=False)
    assert count_parameters(plan.geometry, 131) == transformers.Qwen3MoeForCausalLM(config).num_parameters()


@pytest.mark.parametrize("rank", [40, None])
def test_parameters_of_latent_attention_are_the_references(rank: int | None):
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(
        num_hidden_layers=8,
        hidden_size=64,
        intermediate_size=160,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=131,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=48,
        n_shared_experts=2,
        first_k_dense_replace=3,
        q_lora_rank=rank,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=12,
        tie_word_embeddings=False,
    )
    experts = tiny.EXPERTS | {"first_dense_layers": 3, "shared_ffn_hidden_size": 96}
    latent = tiny.LATENT | {"q_lora_rank": rank}
    plan = planned(experts=experts, latent=latent, tie_word_embeddings=False)
    assert count_parameters(plan.geometry, 131) == transformers.DeepseekV3ForCausalLM(config).num_parameters()


def test_parameters_of_an_indexer():
    options = {"experts": tiny.EXPERTS, "tie_word_embeddings": False}
    without, plan = planned(latent=tiny.LATENT, **options), planned(latent=tiny.SPARSE, **options)
    more = count_parameters(plan.geometry, 131) - count_parameters(without.geometry, 131)
    indexer = 40 * 30 + 64 * 10 + 64 * 3 + 2 * 10
    assert more == 8 * indexer
    shared = planned(latent=tiny.SHARED, prediction_layers=1, **options)
    further = planned(latent=tiny.LATENT, prediction_layers=1, **options)
    assert count_parameters(shared.geometry, 131) - count_parameters(further.geometry, 131) == (8 - 5 + 1) * indexer


def test_parameters_of_qwen3_vision_are_the_references():
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    config = modeling.Qwen3VLVisionConfig(
        depth=3,
        hidden_size=48,
        intermediate_size=72,
        num_heads=4,
        patch_size=3,
        temporal_patch_size=2,
        num_position_embeddings=16,
        out_hidden_size=40,
        deepstack_visual_indexes=[0, 2],
    )
    encoder = EncoderGeometry(**tiny.ENCODER)
    projector = ProjectorGeometry(input_size=48, output_size=40, normalization="LayerNorm", norm_epsilon=1e-6)
    counted = encoder_elements(encoder).total + projector_elements(projector, encoder).total
    assert counted == sum(one.numel() for one in modeling.Qwen3VLVisionModel(config).parameters())


def test_parameters_of_qwen2_5_vision_are_the_references():
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    config = modeling.Qwen2_5_VLVisionConfig(
        depth=3, hidden_size=48, intermediate_size=70, num_heads=4, patch_size=3, out_hidden_size=40
    )
    encoder = EncoderGeometry(
        **tiny.ENCODER
        | {
            "ffn_hidden_size": 70,
            "normalization": "RMSNorm",
            "gated": True,
            "patch_bias": False,
            "position_embeddings": None,
            "deepstack_layers": (),
        }
    )
    projector = ProjectorGeometry(input_size=48, output_size=40, normalization="RMSNorm", norm_epsilon=1e-6)
    counted = encoder_elements(encoder).total + projector_elements(projector, encoder).total
    reference = modeling.Qwen2_5_VisionTransformerPretrainedModel(config)
    assert counted == sum(one.numel() for one in reference.parameters())


def test_stages_with_experts_add_up():
    plan = planned(2, **{PP: 2, VPP: 2, "experts": tiny.EXPERTS | {"first_dense_layers": 3}, "global_batch_size": 2})
    assert [stage_layers(plan.geometry, plan.layout, stage) for stage in range(2)] == [(2, 4), (1, 4)]
    shared = 131 * 64  # the tied table stands on both ends
    assert sum(stage_parameters(plan.geometry, 131, plan.layout)) == count_parameters(plan.geometry, 131) + shared


def test_expert_parallelism_divides_experts_alone():
    whole = stage_held(planned(experts=tiny.EXPERTS).geometry, 131, planned().layout)[0]
    plan = planned(4, **{EP: 4, "experts": tiny.EXPERTS, "use_distributed_optimizer": True})
    spread = stage_held(plan.geometry, 131, plan.layout)[0]
    assert (spread.dense, spread.experts) == (whole.dense, whole.experts // 4)
    assert whole.experts == 8 * 12 * 3 * 48 * 64
    # Experts have one copy each: only what all four ranks hold is divided by the distributed optimizer.
    assert stage_memory(plan)[0].optimizer == 12 * spread.dense // 4 + 12 * spread.experts


def test_flops_of_experts_count_those_a_token_meets():
    options = {"num_layers": 2, "tie_word_embeddings": True, "experts": MIXED}
    plan = planned(**options)
    dense = planned(num_layers=2)
    inner = 3 * 64 * (3 * 48 + 20) + 12 * 64
    assert flops_per_token(plan) - flops_per_token(dense) == 6 * (inner - 3 * 160 * 64)


def test_flops_of_latent_attention():
    plan = planned(num_layers=1, latent=tiny.LATENT)
    matrices = 64 * 40 + 40 * 8 * 24 + 64 * (24 + 8) + 24 * 8 * (16 + 12) + 8 * 12 * 64
    matrices += 3 * 160 * 64 + 131 * 64
    assert flops_per_token(plan) == 6 * (matrices + 8 * (24 + 12) * 128 // 2)


def test_flops_of_an_indexer():
    """Attention counts 48 of 128 keys once they are there: 48 - 48 x 48 / (2 x 128) = 39 in the mean, where 64 are half
    of the length; the indexer its matrices, and 64 scores of 3 heads of 10 channels."""
    dense, sparse, taught = (
        flops_per_token(planned(num_layers=1, latent=one)) for one in (tiny.LATENT, tiny.SPARSE, tiny.TAUGHT)
    )
    matrices = 40 * 30 + 64 * (10 + 3)
    assert sparse - dense == 6 * 8 * (24 + 12) * (39 - 64) + 2 * (matrices + 30 * 64)
    assert taught - sparse == 2 * (matrices + 2 * 30 * 39)


def test_the_warm_up_of_indexers_trains_them_alone():
    options = {"experts": tiny.EXPERTS | {"first_dense_layers": 3}, "world": 2, PP: 2, "global_batch_size": 2}
    plan = planned(**options, latent=tiny.WARMED)
    held = 4 * (40 * 30 + 64 * (10 + 3) + 2 * 10)
    assert [(one.gradients, one.optimizer) for one in stage_memory(plan)] == [(4 * held, 12 * held)] * 2
    dense, taught = (flops_per_token(planned(num_layers=1, latent=one)) for one in (tiny.LATENT, tiny.WARMED))
    matrices = 40 * 30 + 64 * (10 + 3)
    # Forward and gradients of inputs where training has three; the indexer learns from all 64 keys of the mean token.
    assert taught == dense * 2 // 3 + 2 * (2 * matrices + 30 * 64 + 2 * 30 * 64)


def test_recomputation_keeps_what_layers_hand_on():
    """Layers 0, 2 and 6 tell the next one 48 keys of four bytes for each of 128 tokens."""
    sharing = tiny.SPARSE | {"index": tiny.SPARSE["index"] | {"shared_layers": (1, 3, 4, 5, 7)}}
    every, shared = (
        stage_memory(planned(latent=one, recompute_granularity="selective", recompute_modules=("core_attn",)))[0]
        for one in (tiny.SPARSE, sharing)
    )
    assert shared.activations - every.activations == 3 * 48 * 4 * 128


def test_layers_that_share_compute_no_scores():
    every, shared = (flops_per_token(planned(latent=one)) for one in (tiny.TAUGHT, tiny.SHARED))
    assert every - shared == 5 * 2 * (2 * (40 * 30 + 64 * (10 + 3)) + 30 * 64 + 2 * 30 * 39)


def test_flops_of_an_image():
    plan = sighted(encoder={"num_layers": 1, "deepstack_layers": ()})
    patches, hidden = 24, 48
    forward = patches * (54 * hidden + 4 * hidden**2 + 2 * hidden * 72 + 2 * hidden * patches)
    project = 6 * (192 * 192 + 192 * 64)
    assert encoder_flops(plan, (1, 4, 6)) == 2 * 3 * (forward + project)
    frozen = sighted(encoder={"num_layers": 1, "deepstack_layers": (), "freeze": True})
    assert encoder_flops(frozen, (1, 4, 6)) == 2 * (forward + 3 * project)
    assert encoder_flops(planned(), (1, 4, 6)) == 0


def test_a_frozen_foundation_still_hands_gradients_down():
    trained, frozen = flops_per_token(sighted()), flops_per_token(sighted(freeze=True))
    assert frozen * 3 == trained * 2


def test_assumed_images_fill_half_a_sequence():
    budget = ImageBudget.of(sighted(seq_length=4096))
    assert (budget.features, budget.grid, budget.images) == (1024, (1, 64, 64), 2.0)
    small = ImageBudget.of(sighted())
    assert (small.features, small.grid, small.images) == (64, (1, 16, 16), 1.0)
    assert str(small) == "1 image of 64 features per sequence"


def test_state_of_the_encoder_is_divided_over_its_own_copies():
    plan = sighted(4, **{TP: 2, "enable_encoder_hetero_dp": True, "use_distributed_optimizer": True})
    held = encoder_elements(EncoderGeometry(**tiny.ENCODER)).total
    memory = encoder_memory(plan)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * held, 4 * held, 3 * held)
    frozen = encoder_memory(sighted(4, **{TP: 2, "encoder": {"freeze": True}}))
    assert (frozen.gradients, frozen.optimizer) == (0, 0)


def test_features_in_flight():
    each = 64  # of a sequence of 128 tokens
    options = {PP: 2, "global_batch_size": 16}
    assert features_in_flight(sighted(4, **options)) == 2 * each
    assert features_in_flight(sighted(4, **options, enable_full_hetero_dp=True)) == 8 * each / 2
    assert features_in_flight(sighted(6, **options, encoder_ranks=2)) == 3 * each
    interleaved = options | {VPP: 2, "num_layers": 8}
    assert features_in_flight(sighted(4, **interleaved)) == 3 * each  # chunks 0 0 1 1 0 are under way


def test_only_ahead_do_features_wait_and_offload_frees_the_device():
    options = {PP: 2, "global_batch_size": 16}
    plan = sighted(4, **options, enable_full_hetero_dp=True)
    assert waiting_bytes(plan) == 2 * 4 * 64 * 3 * 64 * 2  # with gradients, half of 8, three levels, two bytes
    assert waiting_bytes(sighted(4, **options)) == 0
    offloaded = sighted(4, **options, enable_full_hetero_dp=True, full_hetero_dp_cpu_offload=True)
    assert waiting_bytes(offloaded) == 0
    assert projector_memory(plan).total - projector_memory(offloaded).total == waiting_bytes(plan)


def test_the_fullest_rank_by_mode():
    options = {PP: 2, "global_batch_size": 16, "seq_length": 1024}

    def tower(plan: Plan) -> int:
        return encoder_memory(plan).total + projector_memory(plan).total

    inline = sighted(4, **options)
    stages = [stage.total for stage in stage_memory(inline)]
    assert report(inline).peak_bytes == max(stages[0] + tower(inline), stages[1])
    apart = sighted(6, **options, encoder_ranks=2)
    assert report(apart).peak_bytes == max(tower(apart), *stages)
    ahead = sighted(4, **options, enable_full_hetero_dp=True)
    assert report(ahead).peak_bytes == max(stages[0] + tower(ahead), stages[1] + tower(ahead) - waiting_bytes(ahead))


def test_traffic_of_the_encoder():
    plan = sighted(2, **{TP: 2})
    patches, hidden = 256, 48
    gradients = 0  # one copy
    assert traffic(plan).encoder == 2 * 3 * 2 * 2 * (patches * hidden * 2) // 2 + gradients
    assert traffic(plan).features == 2 * (64 // 2 * 3 * 64 * 2) // 2
    spread = sighted(2)
    held = encoder_elements(EncoderGeometry(**tiny.ENCODER)).total
    assert spread.projector_geometry is not None
    held += projector_elements(spread.projector_geometry, EncoderGeometry(**tiny.ENCODER)).total
    assert (traffic(spread).encoder, traffic(spread).features) == (4 * held, 0)


def test_traffic_of_experts():
    plan = planned(2, **{EP: 2, "experts": tiny.EXPERTS | {"first_dense_layers": 2}})
    tokens = 128 * 64 * 2
    assert traffic(plan).expert == 6 * 4 * tokens * 3 // 2
    assert traffic(planned(2, experts=tiny.EXPERTS)).expert == 0


def test_the_all_gather_sends_every_token_to_every_rank():
    options = {EP: 2, "experts": tiny.EXPERTS | {"first_dense_layers": 2}}
    plan = planned(2, **options, moe_token_dispatcher_type="allgather")
    tokens = 128 * 64 * 2
    assert traffic(plan).expert == 6 * 4 * tokens
    assert traffic(plan).expert == traffic(planned(2, **options)).expert * 2 // 3, "each token has three experts"
    assert any("by allgather over ep=2 ranks" in note for note in report(plan).notes)
    assert any("by alltoall over ep=2 ranks" in note for note in report(planned(2, **options)).notes)


def test_a_capacity_changes_what_is_sent_and_kept():
    options = {EP: 2, "experts": tiny.EXPERTS}
    plain, half = planned(2, **options), planned(2, **options, moe_expert_capacity_factor=0.5)
    padded = planned(2, **options, moe_expert_capacity_factor=2.0, moe_pad_expert_input_to_capacity=True)
    assert traffic(half).expert * 2 == traffic(plain).expert == traffic(padded).expert // 2
    loose = planned(2, **options, moe_expert_capacity_factor=2.0)
    assert (traffic(loose), stage_memory(loose)) == (traffic(plain), stage_memory(plain)), "nothing is dropped"
    sizes = [stage_memory(plan)[0].activations for plan in (half, plain, padded)]
    experts = plain.geometry.experts
    assert experts is not None
    rows = 128 * 2 * experts.topk * (2 * 64 + 4 * experts.ffn_hidden_size) * plain.geometry.num_layers
    assert (sizes[1] - sizes[0], sizes[2] - sizes[1]) == (rows // 2, rows)
    # 128 tokens x 3 choices / 12 experts x 0.5
    assert any("at most 16 of the 128 tokens" in note for note in report(half).notes)


def test_reports_have_every_component():
    found = report(sighted(4, **{TP: 2, "encoder": {"freeze": True}}))
    assert [part.name for part in found.components] == ["image_encoder", "image_projector", "foundation"]
    assert [part.mode for part in found.components] == ["inline", "inline", None]
    assert [part.trains for part in found.components] == [False, True, True]
    assert found.components[0].axes == {"tp": 2, "cp": 1, "dp": 2, "pp": 1, "vpp": 1, "ep": 1}
    assert found.images == "1 image of 64 features per sequence"
    mixed = report(planned(2, **{EP: 2, "experts": tiny.EXPERTS}))
    assert mixed.components[0].axes["etp"] == 1


def test_geometries_of_the_tiny_models_are_what_they_say():
    shape = planned(experts=MIXED, latent=tiny.LATENT).geometry
    assert isinstance(shape.experts, ExpertGeometry)
    assert isinstance(shape.latent, LatentGeometry)
    assert shape.kv_channels == shape.latent.qk_nope_head_dim + shape.latent.qk_rope_head_dim
