"""Which layouts can run: every rule one sentence that says what is wrong and what to change.

The rules are those of megatron-core 0.19, checked here because it finds them late, on every rank at once, or never.
"""

from __future__ import annotations

from collections.abc import Iterator

from loongforge.core.config.run import ComponentParallel, ParallelConfig
from loongforge.core.plan.candidate import Candidate, divisors
from loongforge.core.plan.delta import delta_rules
from loongforge.core.plan.encoder_rules import encoder_rules
from loongforge.core.plan.expert_rules import expert_rules, latent_rules, prediction_rules, recomputable
from loongforge.core.plan.index import index_rules
from loongforge.core.plan.lora import lora_rules
from loongforge.core.plan.stages import stage_rules, stage_sizes

ENCODER_RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp")
"""Modules megatron-core can recompute in an encoder's layer."""


def problems(candidate: Candidate) -> tuple[str, ...]:
    """Every reason why this candidate cannot run, each a sentence with its remedy; empty when it can."""
    if candidate.world < 1:
        return (f"world={candidate.world!r} must be at least 1: start at least one worker.",)
    rules = (
        _world, _batch, _length, _schedule, _tensor, _training, _sequence, _positions, _pipeline, _optimizer,
        _recompute, latent_rules, index_rules, delta_rules, expert_rules, prediction_rules, encoder_rules, lora_rules,
        _parts,
    )  # fmt: skip
    return tuple(problem for rule in rules for problem in rule(candidate))


def _world(candidate: Candidate) -> Iterator[str]:
    layout, aside = candidate.layout, candidate.config.parallel.encoder_ranks
    model = layout.tp * layout.pp * layout.cp
    if layout.world < 1:
        yield (
            f"world={candidate.world} leaves no rank to the foundation beside encoder_ranks={aside}: use at least "
            f"{aside + model} ranks, or fewer encoder_ranks."
        )
    elif layout.world % model:
        rounded = max(model, layout.world // model * model) + aside
        given = f"world={candidate.world} - encoder_ranks={aside}" if aside else f"world={candidate.world}"
        yield (
            f"{given} is not a multiple of tp x pp x cp = {layout.tp} x {layout.pp} x {layout.cp} = "
            f"{model}: use {rounded} ranks, or make the axes smaller."
        )
    else:
        stated = candidate.config.model.foundation.parallel.data_parallel_size
        if stated not in (None, layout.dp):
            yield (
                f"model.foundation.data_parallel_size={stated}, but {layout.dp} follows from {layout.world} ranks: "
                f"leave it out or set it to {layout.dp}."
            )


def _batch(candidate: Candidate) -> Iterator[str]:
    train, layout = candidate.config.train, candidate.layout
    unit = train.micro_batch_size * layout.dp
    if candidate.global_batch_size % unit:
        nearest = max(1, round(candidate.global_batch_size / unit)) * unit
        yield (
            f"train.global_batch_size={candidate.global_batch_size} is not a multiple of micro_batch_size x dp = "
            f"{train.micro_batch_size} x {layout.dp} = {unit}: use {nearest}, or change micro_batch_size."
        )


def _length(candidate: Candidate) -> Iterator[str]:
    train, optimizer = candidate.config.train, candidate.config.optimizer
    if train.train_iters is None and train.train_samples is None:
        yield "train.train_iters and train.train_samples are both unset: give one, for example --train-iters 1000."
    elif candidate.train_iters < 1:
        yield (
            f"train.train_samples={train.train_samples} is less than one global batch of "
            f"{candidate.global_batch_size}: ask for more samples or use a smaller global_batch_size."
        )
    else:
        decay = optimizer.lr_decay_iters or candidate.train_iters
        fraction = optimizer.lr_warmup_fraction
        warmup = optimizer.lr_warmup_iters if fraction is None else fraction * decay
        if warmup >= decay:
            given = f"lr_warmup_iters={warmup}" if fraction is None else f"lr_warmup_fraction={fraction}"
            yield (
                f"optimizer.{given} leaves no step to decay in {decay} decay steps: "
                "warm up for fewer steps, or raise lr_decay_iters or train_iters."
            )


def _schedule(candidate: Candidate) -> Iterator[str]:
    """What megatron-core's schedule asserts late, without a message, or takes silently."""
    section = candidate.config.optimizer
    decay = section.lr_decay_iters or candidate.train_iters
    if section.lr_warmup_init > section.lr:
        yield f"optimizer.lr_warmup_init={section.lr_warmup_init} is above lr={section.lr}: begin the warm-up lower."
    if section.lr_decay_style == "WSD" and section.lr_wsd_decay_iters is None:
        yield "optimizer.lr_decay_style='WSD' needs lr_wsd_decay_iters: the steps of its last phase, for example 100."
    elif section.lr_decay_style == "WSD" and (section.lr_wsd_decay_iters or 0) > decay:
        yield (
            f"optimizer.lr_wsd_decay_iters={section.lr_wsd_decay_iters} is longer than the whole decay of {decay} "
            "steps: shorten it, or raise lr_decay_iters or train_iters."
        )
    start = section.weight_decay if section.start_weight_decay is None else section.start_weight_decay
    end = section.weight_decay if section.end_weight_decay is None else section.end_weight_decay
    if end < start:
        yield f"optimizer: weight decay cannot shrink from {start} to {end}: let end_weight_decay be the larger one."
    elif end > start and section.weight_decay_incr_style == "constant":
        yield (
            f"optimizer: weight decay grows from {start} to {end} but weight_decay_incr_style is 'constant': "
            "use 'linear' or 'cosine', or give one weight_decay."
        )
    for name, component in candidate.config.model.components.items():
        if component.lr_mult <= 0:
            yield f"model.{name}.lr_mult must be above 0, got {component.lr_mult}: use freeze=true to leave it alone."


def _tensor(candidate: Candidate) -> Iterator[str]:
    geometry, tp = candidate.geometry, candidate.layout.tp
    name = "parallel.tensor_model_parallel_size"
    if geometry.latent is None:
        yield from _query_groups(candidate)
    elif geometry.num_attention_heads % tp:
        heads = geometry.num_attention_heads
        yield f"{name}={tp} does not divide num_attention_heads={heads}: use {divisors(heads)}."
    experts = geometry.experts
    if (experts is None or experts.first_dense_layers) and geometry.ffn_hidden_size % tp:
        yield (
            f"{name}={tp} does not divide ffn_hidden_size={geometry.ffn_hidden_size}: "
            "use a tensor parallel size that does."
        )


def _query_groups(candidate: Candidate) -> Iterator[str]:
    geometry, tp = candidate.geometry, candidate.layout.tp
    heads, groups = geometry.num_attention_heads, geometry.num_query_groups
    name = "parallel.tensor_model_parallel_size"
    if heads % groups:
        yield (
            f"model.foundation: num_attention_heads={heads} is not a multiple of num_query_groups={groups}: "
            "correct one of the two."
        )
    if heads % tp:
        yield f"{name}={tp} does not divide num_attention_heads={heads}: use {divisors(heads)}."
    elif groups % tp and tp % groups:
        legal = [size for size in divisors(heads) if not (groups % size and size % groups)]
        yield (
            f"{name}={tp} is neither a divisor nor a multiple of num_query_groups={groups}, so key/value heads can be "
            f"neither split nor replicated: use {legal}."
        )
    elif (rows := (heads * (1 + geometry.attention_gate) + 2 * groups) * geometry.kv_channels) % tp:
        yield f"{name}={tp} does not divide the {rows} rows of the fused QKV matrix: use a smaller one."


def _training(candidate: Candidate) -> Iterator[str]:
    components = candidate.config.model.components
    if (
        candidate.config.optimizer.lr > 0
        and not candidate.config.lora.on
        and all(component.freeze for component in components.values())
    ):
        frozen = " and ".join(f"model.{name}.freeze=True" for name in reversed(components))
        leaves = "leave" if len(components) > 1 else "leaves"
        yield f"{frozen} {leaves} nothing to train: freeze less, or set lr to 0."


def _sequence(candidate: Candidate) -> Iterator[str]:
    layout, length = candidate.layout, candidate.config.train.seq_length
    if layout.sp and layout.tp == 1:
        yield (
            "parallel.sequence_parallel=True needs tensor parallel ranks to split over, but "
            "tensor_model_parallel_size=1: raise it or drop sequence_parallel."
        )
    unit = 2 * layout.cp if layout.cp > 1 else 1
    if length % unit:
        yield (
            f"train.seq_length={length} is not a multiple of 2 x context_parallel_size = {unit} (each rank holds one "
            f"early and one late slice): use {-(-length // unit) * unit}."
        )
    elif layout.sp and (length // layout.cp) % layout.tp:
        both = layout.cp * layout.tp
        yield (
            f"train.seq_length={length} cannot be split for sequence_parallel: {length // layout.cp} tokens per "
            f"context parallel rank over tp={layout.tp}: use {-(-length // (2 * both)) * 2 * both}."
        )


def _positions(candidate: Candidate) -> Iterator[str]:
    length, limit = candidate.config.train.seq_length, candidate.geometry.rotary_limit
    if limit is not None and length > limit:
        yield (
            f"train.seq_length={length} is more than the {limit} tokens up to which this model's rotary positions are "
            f"the plain ones: use at most {limit}, or train it without the stretch (rope_scaling null in config.json, "
            "model.foundation.dynamic_rope_factor=null)."
        )


def _pipeline(candidate: Candidate) -> Iterator[str]:
    layout = candidate.layout
    if layout.vpp and layout.pp == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size={layout.vpp} interleaves pipeline stages, but "
            "pipeline_model_parallel_size=1: raise it or drop the virtual stages."
        )
        return
    yield from stage_rules(candidate)
    micro = candidate.config.train.micro_batch_size * layout.dp
    num_microbatches = candidate.global_batch_size // micro
    if layout.vpp and candidate.global_batch_size % micro == 0 and num_microbatches % layout.pp:
        multiple = -(-num_microbatches // layout.pp) * layout.pp
        yield (
            f"the interleaved pipeline needs a multiple of {layout.pp} micro-batches, but global_batch_size="
            f"{candidate.global_batch_size} gives {num_microbatches}: use global_batch_size={multiple * micro}, or "
            "drop virtual_pipeline_model_parallel_size."
        )


def _optimizer(candidate: Candidate) -> Iterator[str]:
    parallel = candidate.config.parallel
    lacking = [name for name in ("use_distributed_optimizer", "overlap_grad_reduce") if not getattr(parallel, name)]
    if parallel.overlap_param_gather and lacking:
        yield f"parallel.overlap_param_gather=True needs {' and '.join(lacking)}: turn on, or drop the overlap."


def _recompute(candidate: Candidate) -> Iterator[str]:
    layout, geometry = candidate.layout, candidate.geometry
    layers = max(1, *stage_sizes(geometry.num_layers, layout)) // layout.num_chunks
    what = "this model" if geometry.experts or geometry.latent else "a dense model"
    yield from _recomputed("parallel", candidate.config.parallel, layers, recomputable(geometry), what)
    encoder = candidate.config.model.image_encoder
    if encoder is not None and candidate.encoder_geometry is not None:
        layers = candidate.encoder_geometry.num_layers
        yield from _recomputed("model.image_encoder", encoder.parallel, layers, ENCODER_RECOMPUTE_MODULES, "an encoder")


def _recomputed(
    path: str, section: ParallelConfig | ComponentParallel, layers: int, known: tuple[str, ...], what: str
) -> Iterator[str]:
    granularity, method, count = section.recompute_granularity, section.recompute_method, section.recompute_num_layers
    modules = ("core_attn",) if section.recompute_modules is None else section.recompute_modules
    if granularity == "full":
        yield from _full_recompute(path, section, layers)
    elif method is not None or count is not None:
        yield (
            f"{path}.recompute_method={method!r} and recompute_num_layers={count!r} belong to "
            f"recompute_granularity='full', not {granularity!r}: set it to 'full' or drop them."
        )
    if granularity == "selective":
        unknown = sorted(set(modules) - set(known))
        if unknown or not modules:
            yield (
                f"{path}.recompute_modules={list(modules)} cannot be recomputed in {what}: "
                f"choose among {', '.join(known)}."
            )
    elif modules != ("core_attn",):
        yield (
            f"{path}.recompute_modules={list(modules)} belongs to recompute_granularity='selective', "
            f"not {granularity!r}: set it to 'selective' or drop the modules."
        )


def _full_recompute(path: str, section: ParallelConfig | ComponentParallel, layers: int) -> Iterator[str]:
    method, count = section.recompute_method, section.recompute_num_layers
    if method is None or count is None:
        yield (
            f"{path}.recompute_granularity='full' needs recompute_method ('uniform' or 'block', got {method!r}) and "
            f"recompute_num_layers (1 to {layers}, got {count!r}): give both, for example uniform and 1."
        )
    elif count > layers:
        yield (
            f"{path}.recompute_num_layers={count} is more than the {layers} layers of "
            f"{'a model chunk' if path == 'parallel' else 'the encoder'}: use 1 to {layers}."
        )


def _parts(candidate: Candidate) -> Iterator[str]:
    """Whether the components understand each other."""
    if len(candidate.config.model.components) > 1:
        from loongforge.core.model.negotiate import negotiate

        yield from negotiate(candidate.config.model)
