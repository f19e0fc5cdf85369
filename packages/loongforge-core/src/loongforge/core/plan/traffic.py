"""Bytes that the busiest rank sends per optimizer step, by axis.

A collective over n ranks on N bytes is counted as its ring algorithm: each rank sends (n-1)/n x N for an all-gather or
a reduce-scatter, twice that for an all-reduce (Patarasuk and Yuan, 2009). Norm gradients under sequence parallelism,
the loss and the gradient norm are too small to count.
"""

from __future__ import annotations

from dataclasses import dataclass

from loongforge.core.plan.encoder_memory import tower_parameters
from loongforge.core.plan.images import ImageBudget
from loongforge.core.plan.lora import tower_adapters
from loongforge.core.plan.memory import element_bytes, gradient_bytes, sent_share, stage_trained, stays
from loongforge.core.plan.parameters import dense_layers
from loongforge.core.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes one rank sends per optimizer step."""

    tensor: int
    context: int
    pipeline: int
    data: int
    embedding: int
    """Gradient of tied embeddings between the first and the last stage."""
    expert: int
    """Tokens on their way to their experts and back."""
    encoder: int
    """Inside encoder and projector: activations of tensor parallel ranks, and gradients."""
    features: int
    """From the encoder to the tokens, and their gradients back."""

    @property
    def total(self) -> int:
        """All axes."""
        return (
            self.tensor
            + self.context
            + self.pipeline
            + self.data
            + self.embedding
            + self.expert
            + self.encoder
            + self.features
        )


def traffic(plan: Plan) -> Traffic:
    """What the busiest rank sends on every axis in one optimizer step."""
    return Traffic(
        tensor=_tensor(plan),
        context=_context(plan),
        pipeline=_pipeline(plan),
        data=_data(plan),
        embedding=_embedding(plan),
        expert=_expert(plan),
        encoder=_encoder(plan),
        features=_features(plan),
    )


def _ring(ranks: int, size: float) -> float:
    """Bytes a rank sends in one all-gather or reduce-scatter whose full size is `size`."""
    return (ranks - 1) / ranks * size


def _hidden(plan: Plan) -> int:
    """Bytes of one micro-batch's hidden states on one context parallel rank, not split by sequence parallelism."""
    tokens = plan.micro_batch_size * plan.seq_length // plan.layout.cp
    return tokens * plan.geometry.hidden_size * element_bytes(plan)


def _recomputed(plan: Plan, module: str) -> float:
    """Share of layers whose `module` runs forward twice."""
    parallel = plan.config.parallel
    if parallel.recompute_granularity == "selective":
        return float(module in parallel.recompute_modules)
    if parallel.recompute_granularity == "full" and parallel.recompute_method == "block":
        return min(1.0, (parallel.recompute_num_layers or 1) / plan.layers_per_chunk)
    return float(parallel.recompute_granularity == "full")


def _tensor(plan: Plan) -> int:
    """Shoeybi et al., "Megatron-LM" (2019): per layer one all-reduce after attention and one after the MLP, forward and
    backward. Sequence parallelism (Korthikanti et al., 2022) makes each an all-gather and a reduce-scatter, and gathers
    each block's input once more for the weight gradient. Recomputed blocks repeat their forward share. The embedding
    adds one all-reduce on the first stage, the output layer one on the last, or such a pair without once more, because
    the loss computes both gradients ahead; with one stage a rank sends both.
    """
    layout = plan.layout
    if layout.tp == 1:
        return 0
    layers, each = plan.layers_per_chunk * layout.num_chunks, 5 if layout.sp else 4
    attention, mlp = each + 2 * _recomputed(plan, "attention"), each + 2 * _recomputed(plan, "mlp")
    plain = dense_layers(plan.geometry) / plan.geometry.num_layers
    if not _experts_gather(plan):
        mlp *= plain
    ends = 4 if layout.pp == 1 else 2
    per_microbatch = (layers * (attention + mlp) + ends) * _ring(layout.tp, _hidden(plan))
    return round(plan.num_microbatches * per_microbatch)


def _experts_gather(plan: Plan) -> bool:
    """Whether tensor parallel ranks exchange tokens in layers with experts: for the shared one, or inside experts."""
    experts = plan.geometry.experts
    return experts is not None and (experts.shared_ffn_hidden_size is not None or plan.layout.etp > 1)


def _expert(plan: Plan) -> int:
    """Each token goes to its experts and comes back, forward and backward, from the rank that holds its part of the
    sequence; (ep - 1) / ep of them live elsewhere when the load is even. The all-gather sends it to every rank of the
    expert axis, wherever its experts live, and the reduce-scatter back; what tensor parallel experts gather besides is
    counted with that axis."""
    layout, experts = plan.layout, plan.geometry.experts
    if experts is None or layout.ep == 1:
        return 0
    layers = plan.geometry.num_layers - dense_layers(plan.geometry)
    times = 4 + 2 * _recomputed(plan, "moe")
    if plan.config.moe.moe_token_dispatcher_type == "allgather":
        rows = _hidden(plan) / layout.tp * layout.etp * layout.ep
    else:
        rows = _hidden(plan) / layout.tp * experts.topk * sent_share(plan)
    return round(plan.num_microbatches * layers / layout.pp * times * _ring(layout.ep, rows))


def _context(plan: Plan) -> int:
    """Keys and values of all context parallel ranks are gathered in every layer, their gradients reduce-scattered."""
    layout, geometry = plan.layout, plan.geometry
    if layout.cp == 1:
        return 0
    tokens = plan.micro_batch_size * plan.seq_length
    heads = geometry.kv_channels * 2 * max(geometry.num_query_groups / layout.tp, 1)
    if geometry.latent is not None:
        heads = geometry.num_attention_heads / layout.tp * (geometry.kv_channels + geometry.latent.v_head_dim)
    both = tokens * heads * element_bytes(plan)
    times = 2 + _recomputed(plan, "core_attn")
    return round(plan.num_microbatches * plan.layers_per_chunk * layout.num_chunks * times * _ring(layout.cp, both))


def _pipeline(plan: Plan) -> int:
    """Every chunk sends its output on and its input's gradient back, but for the ends of the chain."""
    layout = plan.layout
    if layout.pp == 1:
        return 0
    sends = 2 * layout.num_chunks - (1 if layout.pp == 2 else 0)
    return plan.num_microbatches * sends * _hidden(plan) // (layout.tp if layout.sp else 1)


def _data(plan: Plan) -> int:
    """Gradients are all-reduced; or reduce-scattered and the new weights gathered (distributed optimizer)."""
    layout = plan.layout
    each = gradient_bytes(plan, frozen=stays(plan))
    if not each:
        return 0
    both = each + (element_bytes(plan) if plan.config.parallel.use_distributed_optimizer else each)
    stages = stage_trained(plan)
    return max(
        round(_ring(layout.dp * layout.cp, held.dense * both) + _ring(layout.expert_dp, held.experts * both))
        for held in stages
    )


def _embedding(plan: Plan) -> int:
    if plan.layout.pp == 1 or not plan.geometry.tie_word_embeddings or plan.adapters:
        return 0
    table = plan.padded_vocab_size // plan.layout.tp * plan.geometry.hidden_size
    return round(2 * _ring(2, table * gradient_bytes(plan, frozen=plan.config.model.foundation.freeze)))


def encoder_exchange(plan: Plan) -> float:
    """Bytes that a tensor parallel rank of the encoder sends for one of the assumed images: two all-reduces per layer,
    forward and, when it trains, backward."""
    encoder, geometry, component = plan.encoder, plan.encoder_geometry, plan.config.model.image_encoder
    if encoder is None or geometry is None or component is None:
        return 0.0
    size = ImageBudget.of(plan).patches * geometry.hidden_size * element_bytes(plan)
    return (2 if plan.trains("image_encoder") else 1) * geometry.num_layers * 2 * 2 * _ring(encoder.tp, size)


def _encoder(plan: Plan) -> int:
    if plan.encoder is None:
        return 0
    images = plan.global_batch_size * ImageBudget.of(plan).images / plan.encoder.dp
    total = images * encoder_exchange(plan)
    for name, (_, held) in tower_parameters(plan).items():
        each = gradient_bytes(plan, frozen=not plan.trains(name))
        if each:
            trained = tower_adapters(plan, name) if plan.adapters else held
            other = element_bytes(plan) if plan.config.parallel.use_distributed_optimizer else each
            total += _ring(plan.encoder.dp, trained * (each + other))
    return round(total)


def _features(plan: Plan) -> int:
    """Of the ranks that exchange features, all but a feature's own need it sent; apart all do."""
    encoder, layout, geometry = plan.encoder, plan.layout, plan.encoder_geometry
    if encoder is None or geometry is None:
        return 0
    images = ImageBudget.of(plan)
    row = (1 + geometry.levels) * plan.geometry.hidden_size * element_bytes(plan)
    size = plan.global_batch_size * images.images * images.features / encoder.size * row
    ranks = max(encoder.tp, layout.tp * layout.cp) * (layout.pp if encoder.mode == "ahead" else 1)
    return round(2 * (size if encoder.mode == "apart" else _ring(ranks, size)))
