"""Bytes that a rank of each pipeline stage needs: weights, gradients, optimizer state, activations at their peak.

Activations follow Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (2022), counted
anew for grouped-query attention, SwiGLU, RMSNorm and a fused attention that keeps no s x s matrix. What an allocator
wastes, what a kernel needs for a moment and the buffers of collectives are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from loongforge.core.model.geometry import LatentGeometry
from loongforge.core.plan.delta import delta_bytes, delta_layers
from loongforge.core.plan.index import gathered_elements, less_kept, route_of, told_bytes, warms_up
from loongforge.core.plan.index import kept_bytes as index_bytes
from loongforge.core.plan.lora import stage_adapters
from loongforge.core.plan.parameters import Held, dense_layers, stage_held, stage_indexers, stage_layers
from loongforge.core.plan.plan import Plan
from loongforge.core.plan.stages import stage_chunks

FP32 = 4

LOSS_BLOCK_BYTES = 1 << 30
"""Logits that exist at a time, as `loongforge.kernels.linear_cross_entropy` has it on accelerators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def stage_memory(plan: Plan) -> tuple[Memory, ...]:
    """What one rank of each pipeline stage holds of the foundation at its peak, in stage order.

    With adapters these alone have gradients and optimizer state; their own activations are not counted.
    """
    layout, frozen = plan.layout, stays(plan)
    copies = (layout.dp * layout.cp, layout.expert_dp)
    whole = stage_held(plan.geometry, plan.padded_vocab_size, layout)
    return tuple(
        Memory(
            weights=(held.total + (trained.total if plan.adapters else 0)) * element_bytes(plan),
            gradients=trained.total * gradient_bytes(plan, frozen=frozen),
            optimizer=sum(
                optimizer_bytes(plan, parameters, shards, frozen=frozen)
                for parameters, shards in zip((trained.dense, trained.experts), copies, strict=True)
            ),
            activations=_activations(plan, stage),
        )
        for stage, (held, trained) in enumerate(zip(whole, stage_trained(plan), strict=True))
    )


def stage_trained(plan: Plan) -> tuple[Held, ...]:
    """What trains on one rank of each pipeline stage, in stage order, if anything does: adapters, indexers in their
    warm-up, or the whole."""
    if plan.adapters:
        return stage_adapters(plan)
    if warms_up(plan.geometry):
        return stage_indexers(plan.geometry, plan.layout)
    return stage_held(plan.geometry, plan.padded_vocab_size, plan.layout)


def stays(plan: Plan) -> bool:
    """Whether nothing of the foundation trains."""
    return not plan.trains("foundation")


def element_bytes(plan: Plan) -> int:
    """Bytes of one element in the compute type."""
    return 2 if plan.config.train.precision == "bf16" else FP32


def gradient_bytes(plan: Plan, *, frozen: bool) -> int:
    """Bytes per parameter in the gradient buffer of a component."""
    if frozen:
        return 0
    return FP32 if plan.config.train.grad_reduce_in_fp32 else element_bytes(plan)


def optimizer_bytes(plan: Plan, parameters: int, copies: int, *, frozen: bool) -> int:
    """Two fp32 moments, and for bf16 an fp32 master copy and, when the buffer is bf16, fp32 gradients of it.

    The distributed optimizer (Rajbhandari et al., "ZeRO", 2020, stage 1) divides them over the ranks that hold copies.
    """
    if frozen:
        return 0
    each = 2 * FP32
    if plan.config.train.precision == "bf16":
        each += FP32
        if gradient_bytes(plan, frozen=False) != FP32:
            each += FP32
    return -(-parameters * each // (copies if plan.config.parallel.use_distributed_optimizer else 1))


def chunks_in_flight(plan: Plan, stage: int) -> int:
    """Micro-batch chunks whose activations a stage holds at its peak.

    1F1B (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", 2021): the warm-up forwards
    and the one in work. Interleaved: megatron-core warms up with 2 x (pp - stage - 1) + (vpp - 1) x pp chunks.
    """
    layout = plan.layout
    total = plan.num_microbatches * layout.num_chunks
    if layout.vpp is None:
        return min(total, layout.pp - stage)
    return min(total, 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1)


def _activations(plan: Plan, stage: int) -> int:
    kept, working = _chunk_activations(plan, stage)
    total = chunks_in_flight(plan, stage) * kept + working
    if plan.geometry.latent is None:  # cosines and sines, which all layers share
        total += _local_tokens(plan) // plan.micro_batch_size * plan.geometry.rotated_channels * FP32
    if stage == plan.layout.pp - 1:
        total += _head_activations(plan) + plan.geometry.prediction_layers * _further_activations(plan)
        total += min(_logit_bytes(plan), LOSS_BLOCK_BYTES)
    return total


def _chunk_activations(plan: Plan, stage: int) -> tuple[int, int]:
    """Bytes a forward pass of one chunk leaves behind, and bytes its backward pass recomputes at a time.

    Layers of a stage count as alike, each the mean of those with experts and those without.
    """
    parallel, layers = plan.config.parallel, len(stage_chunks(plan.geometry.num_layers, plan.layout, stage)[0])
    plain, every = stage_layers(plan.geometry, plan.layout, stage)
    layer = layer_activations(plan, experts=False) if plain else 0
    if plain < every:
        layer = (plain * layer + (every - plain) * layer_activations(plan, experts=True)) // every
    layer += _delta_instead(plan) * delta_layers(plan.geometry, plan.layout, stage) // every
    recomputes = parallel.recompute_granularity == "full" or "core_attn" in _dropped(plan)
    told = _local_tokens(plan) * told_bytes(plan, stage) if recomputes else 0
    if "core_attn" not in _dropped(plan):
        layer -= round(_local_tokens(plan) * less_kept(plan, stage, element=element_bytes(plan)) / every)
    residual = _hidden_bytes(plan)
    if parallel.recompute_granularity != "full":
        return layers * layer + told, 0
    group = min(parallel.recompute_num_layers or 1, layers)
    if parallel.recompute_method == "block":
        return group * residual + (layers - group) * layer + told, layer
    return -(-layers // group) * residual + told, group * layer


def layer_activations(plan: Plan, *, experts: bool = False) -> int:
    """Bytes one layer keeps for its backward pass, per micro-batch and rank.

    Per token, in elements: 4h (inputs and outputs of two norms; divided by tp under sequence parallelism), attention,
    and the MLP or experts. Besides: fp32 cosines and sines of latent attention (other layers share theirs), one fp32
    number per norm and per head of the softmax, one byte per element for each dropout mask. Attention is torch's fused
    one, as on accelerators; our CPU kernel keeps probabilities of short sequences on top.
    """
    geometry, layout = plan.geometry, plan.layout
    dropped, tokens = _dropped(plan), _local_tokens(plan)
    heads = geometry.num_attention_heads / layout.tp
    groups = max(geometry.num_query_groups / layout.tp, 1)
    split = layout.tp if layout.sp else 1
    whole = (2 if "layernorm" in dropped else 4) * geometry.hidden_size / split
    attention = _attention_elements(plan) if geometry.latent is None else _latent_elements(plan, geometry.latent)
    wide = _expert_elements(plan) if experts else _mlp_elements(plan)
    normed = 2 if geometry.qk_norm_whole else heads + groups
    numbers = 2 / split + (0 if "core_attn" in dropped else heads) + normed * geometry.qk_layernorm
    turned = 0
    if geometry.latent is not None:
        numbers += 2 / split
        turned = 4 * geometry.latent.qk_rope_head_dim
    masks = 2 * geometry.hidden_size / split if geometry.hidden_dropout else 0.0
    one = tokens / plan.micro_batch_size
    index = 0.0 if "core_attn" in dropped else index_bytes(plan, element=element_bytes(plan))
    elements = tokens * (whole + attention + wide)
    return round(elements * element_bytes(plan) + tokens * (FP32 * numbers + masks + index) + one * turned * FP32)


def _delta_instead(plan: Plan) -> int:
    """Bytes a layer keeps more, or less, with a gated delta rule in place of attention, per micro-batch and rank."""
    geometry, delta = plan.geometry, plan.geometry.delta
    if delta is None:
        return 0
    recomputed = "core_attn" in _dropped(plan)
    heads, groups = geometry.num_attention_heads / plan.layout.tp, geometry.num_query_groups / plan.layout.tp
    numbers = (0 if recomputed else heads) + (heads + groups) * geometry.qk_layernorm
    attention = _attention_elements(plan) * element_bytes(plan) + FP32 * numbers
    rule = delta_bytes(plan, delta, element=element_bytes(plan), recomputed=recomputed)
    return round(_local_tokens(plan) * (rule - attention))


def _attention_elements(plan: Plan) -> float:
    """Per token, divided by tp: the fused QKV output, rotated queries and keys (keys and values of all context ranks,
    as often as they are seen), attention's output before and after its transpose, and put together from two chunks."""
    geometry, layout = plan.geometry, plan.layout
    heads = geometry.num_attention_heads / layout.tp
    groups = max(geometry.num_query_groups / layout.tp, 1)
    # Gathered keys and values are new tensors; one rank's own values stay inside the fused QKV output.
    apart = layout.cp > 1 and "core_attn" not in _dropped(plan)
    gathered = 2 * groups * _seen_keys(plan) if apart else groups
    # With fewer groups than ranks megatron-core gathers the whole fused output and reads its part of it.
    fused = heads + 2 * groups
    if geometry.num_query_groups < layout.tp:
        fused = geometry.num_attention_heads + 2 * geometry.num_query_groups
    if geometry.attention_gate:  # the gate's projection, and its sigmoid and the gated output in fp32
        fused += heads * (1 + 2 * FP32 / element_bytes(plan))
    return (fused + heads + gathered + (3 if apart else 2) * heads) * geometry.kv_channels


def _seen_keys(plan: Plan) -> float:
    """Keys that are kept per token under context parallelism: each of a rank's two chunks keeps those it sees, of
    2 cp chunks one r + 1 and the other 2 cp - r. None without: a rank's own are what the projection gave."""
    return plan.layout.cp + 0.5 if plan.layout.cp > 1 else 0.0


def _latent_elements(plan: Plan, latent: LatentGeometry) -> float:
    """Per token: both latents before and after their norms (divided under sequence parallelism), and divided by tp:
    rotated queries and keys, values and attention's output (both as wide as keys there), and its output again."""
    layout, dropped = plan.layout, _dropped(plan)
    heads, split = plan.geometry.num_attention_heads / layout.tp, layout.tp if layout.sp else 1
    query, value = latent.qk_nope_head_dim + latent.qk_rope_head_dim, latent.v_head_dim
    low = 2 * ((latent.q_lora_rank or 0) + latent.kv_lora_rank) + latent.qk_rope_head_dim
    pair = 0 if "mla_up_proj" in dropped else 2 * query
    if "core_attn" in dropped:
        inner = latent.qk_nope_head_dim + value  # what the up-projection gave holds the values
    elif (route := route_of(plan)) is not None and route.route == "gather":
        return low / split + gathered_elements(plan, latent) + heads * value
    elif latent.index is not None:
        # Values and output of their own width. Gathered keys are kept in place of this rank's.
        inner = value + (query + value) * layout.cp - query
    else:
        inner = 2 * query * (_seen_keys(plan) or 1)  # what is seen is kept in place of a rank's own keys
    return low / split + heads * (pair + inner + value)


def _mlp_elements(plan: Plan) -> float:
    """Per token: gate and up, SiLU of the gate, the product, divided by tp."""
    if "mlp" in _dropped(plan):
        return 0.0
    return (4 if plan.geometry.swiglu else 2) * plan.geometry.ffn_hidden_size / plan.layout.tp


def _expert_elements(plan: Plan) -> float:
    """Per token, for `topk` copies of it on evenly loaded experts: the rows that come in and those that go back, and
    what an MLP keeps; and the same of the shared expert. A capacity changes the number of copies."""
    geometry, layout, experts, dropped = plan.geometry, plan.layout, plan.geometry.experts, _dropped(plan)
    assert experts is not None, "asked of layers with experts only"
    if "moe" in dropped:
        return 0.0
    copies = experts.topk * sent_share(plan)
    rows = 2 * geometry.hidden_size * copies * layout.etp / layout.tp
    shared = 0 if "shared_experts" in dropped else experts.shared_ffn_hidden_size or 0
    return rows + 4 * (copies * experts.ffn_hidden_size + shared) / layout.tp


def sent_share(plan: Plan) -> float:
    """Rows that go to experts relative to the choices: what a capacity keeps of an even load, or pads it to."""
    section = plan.config.moe
    if section.moe_expert_capacity_factor is None:
        return 1.0
    if section.moe_pad_expert_input_to_capacity:
        return section.moe_expert_capacity_factor
    return min(1.0, section.moe_expert_capacity_factor)


def _dropped(plan: Plan) -> tuple[str, ...]:
    parallel = plan.config.parallel
    return parallel.recompute_modules if parallel.recompute_granularity == "selective" else ()


def _head_activations(plan: Plan) -> int:
    """Final norm's input, its output (whole, where sequence parallelism cuts it) with its gradient, and the gradient of
    the output matrix, for the one micro-batch in work: the loss computes them ahead, and logits by the block.

    Of several blocks the matrix's is summed in fp32. Adapters and indexers that warm up leave the matrix as it is.
    """
    whole = _local_tokens(plan) * plan.geometry.hidden_size * element_bytes(plan)
    found = _hidden_bytes(plan) + 2 * whole
    if plan.adapters or warms_up(plan.geometry) or stays(plan):
        return found
    element = element_bytes(plan) if _logit_bytes(plan) <= LOSS_BLOCK_BYTES else FP32
    return found + plan.padded_vocab_size // plan.layout.tp * plan.geometry.hidden_size * element


def _logit_bytes(plan: Plan) -> int:
    return _local_tokens(plan) * plan.padded_vocab_size // plan.layout.tp * element_bytes(plan)


def _further_activations(plan: Plan) -> int:
    """One further layer of multi-token prediction, for the one micro-batch in work: the embedding, both normed inputs
    side by side, the projection (whole, where sequence parallelism cuts it afterwards), the layer, its output once more
    beside those of the other depths, and what the output layer keeps.

    Uniform recomputation keeps both inputs and makes the rest again; by blocks megatron-core leaves these layers out.
    """
    geometry, parallel = plan.geometry, plan.config.parallel
    if parallel.recompute_granularity == "full" and parallel.recompute_method == "uniform":
        return 2 * _hidden_bytes(plan) + _head_activations(plan)
    layer = layer_activations(plan, experts=dense_layers(geometry) < geometry.num_layers)
    norms = 2 * FP32 * _hidden_bytes(plan) // (geometry.hidden_size * element_bytes(plan))
    gathered = (plan.layout.tp - 1) * _hidden_bytes(plan) if plan.layout.sp else 0
    return 4 * _hidden_bytes(plan) + gathered + norms + layer + _head_activations(plan)


def _hidden_bytes(plan: Plan) -> int:
    tokens = _local_tokens(plan) // (plan.layout.tp if plan.layout.sp else 1)
    return tokens * plan.geometry.hidden_size * element_bytes(plan)


def _local_tokens(plan: Plan) -> int:
    """Tokens of one micro-batch on one context parallel rank."""
    return plan.micro_batch_size * plan.seq_length // plan.layout.cp
