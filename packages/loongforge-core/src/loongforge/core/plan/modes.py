"""How long a step takes with the encoder in each of its places, and which place to choose.

Time is counted in FLOPs of one rank: every rank computes equally fast, and what tensor parallel ranks of the encoder
exchange costs `FLOPS_PER_BYTE` each. The foundation's own communication is the same in every mode and left out.
f is the time of a micro-batch on one stage, M their number, e the encoder's time for the images of a micro-batch on the
busiest block of ranks. Images are whole: three of them on two blocks take two turns.

- inline: the first stage works f + e per micro-batch, and in steady state every stage waits for it:
  M (f + e) + (pp - 1) f / vpp
- ahead: the images of all M micro-batches are spread over tp x cp x pp ranks before the pipeline begins:
  e_ahead + (M + (pp - 1) / vpp) f
- apart: encoder and pipeline work at the same time, once the first images are through:
  max(M e, (M + pp - 1) f) + e

All modes have the foundation on the ranks that this plan gives it. Apart the encoder has further ones, so modes are
weighed by ranks x time. Idle is the share of that time in which a rank, on average, waits or exchanges because of the
encoder; what the pipeline leaves idle by itself is `compute.pipeline_bubble`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from loongforge.core.config.run import ComponentConfig, ParallelConfig
from loongforge.core.plan.compute import encoder_flops, flops_per_token
from loongforge.core.plan.encoder_memory import fullest_rank
from loongforge.core.plan.images import ImageBudget
from loongforge.core.plan.legality import Candidate, problems
from loongforge.core.plan.plan import Plan
from loongforge.core.plan.traffic import encoder_exchange

FLOPS_PER_BYTE = 1000.0
"""Of an accelerator that computes 450 TFLOP/s and sends 450 GB/s (H100 SXM, in practice)."""
NOT_WORTH_IT = 0.03
"""A mode is chosen over a simpler one when a step is cheaper by more than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeForecast:
    """The run with its encoder in one place."""

    name: str
    """What to ask for: `homogeneous`, or the flag without its dashes."""
    layout: str
    """`inline tp1 dp4`."""
    ranks: int
    """Of the job: those of the foundation, and in `apart` the encoder's besides."""
    configured: bool
    """This is what the run asks for."""
    refused: str | None = None
    """Why this place cannot be had; what follows is 0 then."""
    step_flops: int = 0
    """Length of a step, in FLOPs that a rank could do meanwhile."""
    idle: float = 0.0
    """Share of the step that ranks lose to the encoder, on average."""
    peak_bytes: int = 0
    """Of the fullest rank."""

    @property
    def cost(self) -> int:
        """Length of a step times its ranks."""
        return self.step_flops * self.ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The mode to choose."""

    mode: str
    why: str


def forecasts(plan: Plan) -> tuple[ModeForecast, ...]:
    """Every mode for this plan's foundation and batch, the configured one marked; empty without an encoder."""
    if plan.encoder is None:
        return ()
    asked, layout = plan.config.parallel, plan.layout
    plain = replace(
        asked, enable_encoder_hetero_dp=False, enable_full_hetero_dp=False, encoder_ranks=0,
        full_hetero_dp_cpu_offload=False,
    )  # fmt: skip
    offload, aside = asked.full_hetero_dp_cpu_offload, asked.encoder_ranks or layout.dp
    ways = {
        "homogeneous": plain,
        "enable-encoder-hetero-dp": replace(plain, enable_encoder_hetero_dp=True),
        "enable-full-hetero-dp": replace(plain, enable_full_hetero_dp=True, full_hetero_dp_cpu_offload=offload),
        f"encoder-ranks {aside}": replace(plain, encoder_ranks=aside),
    }
    found: list[ModeForecast] = []
    for name, parallel in ways.items():
        other = _candidate(plan, parallel, layout.world + parallel.encoder_ranks)
        if all(str(other.encoder) != known.layout for known in found):
            found.append(_forecast(name, other, configured=other.encoder == plan.encoder))
    if not any(one.configured for one in found):
        found.append(_measured("as configured", plan, configured=True))
    return tuple(found)


def _candidate(plan: Plan, parallel: ParallelConfig, world: int) -> Candidate:
    """The same run with its encoder elsewhere; sizes that the run states for one place do not bind another."""
    model, train = plan.config.model, plan.config.train

    def free(component: ComponentConfig | None) -> ComponentConfig | None:
        if component is None:
            return None
        own = replace(component.parallel, tensor_model_parallel_size=None, data_parallel_size=None)
        return replace(component, parallel=own)

    foundation = free(model.foundation)
    assert foundation is not None, "there is always one"
    model = replace(
        model, foundation=foundation, image_encoder=free(model.image_encoder),
        image_projector=free(model.image_projector),
    )  # fmt: skip
    train = replace(train, global_batch_size=plan.global_batch_size)
    config = replace(plan.config, model=model, parallel=parallel, train=train)
    return Candidate.of(config, world)


def _forecast(name: str, candidate: Candidate, *, configured: bool) -> ModeForecast:
    if found := problems(candidate):
        return ModeForecast(
            name=name, layout=str(candidate.encoder), ranks=candidate.world, configured=configured, refused=found[0]
        )
    return _measured(name, Plan.of(candidate.config, candidate.world), configured=configured)


def _measured(name: str, plan: Plan, *, configured: bool) -> ModeForecast:
    length, useful = step_time(plan)
    return ModeForecast(
        name=name, layout=str(plan.encoder), ranks=plan.world, configured=configured, step_flops=round(length),
        idle=1 - useful / length, peak_bytes=fullest_rank(plan),
    )  # fmt: skip


def step_time(plan: Plan) -> tuple[float, float]:
    """FLOPs that a rank could do in a step, and those it does on average, the pipeline's own bubble counted as done."""
    layout, encoder, count = plan.layout, plan.encoder, plan.num_microbatches
    assert encoder is not None, "asked of models with an encoder only"
    images = ImageBudget.of(plan)
    tokens = plan.micro_batch_size * plan.seq_length
    largest = plan.layers_per_chunk * layout.num_chunks / plan.geometry.num_layers
    stage = flops_per_token(plan) * tokens / (layout.tp * layout.cp) * largest
    pipeline = (count + (layout.pp - 1) / layout.num_chunks) * stage
    whole = encoder_flops(plan, images.grid)
    busiest = _turns(plan, images) * (whole / encoder.tp + FLOPS_PER_BYTE * encoder_exchange(plan))
    if encoder.mode == "ahead":
        length = busiest + pipeline
    elif encoder.mode == "apart":
        length = max(count * busiest, pipeline) + busiest
    else:
        length = count * busiest + pipeline
    work = pipeline * layout.world + plan.global_batch_size * images.images * whole
    return length, work / plan.world


def _turns(plan: Plan, images: ImageBudget) -> float:
    """Images that the busiest block of the encoder encodes: of a micro-batch, or ahead of the pipeline of a step."""
    layout, encoder = plan.layout, plan.encoder
    assert encoder is not None, "asked of models with an encoder only"
    together = layout.tp * layout.cp
    blocks, replicas = max(1, together // encoder.tp), max(1, encoder.tp // together)
    items = plan.micro_batch_size * images.images
    if encoder.mode == "apart":
        blocks, replicas = max(1, encoder.dp // layout.dp), max(1, layout.dp // encoder.dp)
    elif encoder.mode == "ahead":
        blocks, items = blocks * layout.pp, items * plan.num_microbatches
    items *= replicas
    return math.ceil(round(items / blocks, 6)) if blocks > 1 else items


def advise(modes: tuple[ModeForecast, ...], replica_ranks: int, device_bytes: int | None = None) -> Advice | None:
    """The mode with the cheapest step among those that fit into `device_bytes`, the simplest of those as good.

    `replica_ranks` is tp x cp x pp. None without an encoder.
    """
    possible = [mode for mode in modes if mode.refused is None]
    if not possible:
        return None
    cheapest = _simplest(possible)
    fitting = [mode for mode in possible if device_bytes is None or mode.peak_bytes <= device_bytes]
    best = _simplest(fitting or possible)
    first = possible[0]
    if best is first:
        why = f"no other place makes a step more than {NOT_WORTH_IT:.0%} shorter" + _counted(possible, best)
        if cheapest is not first and fitting:
            why = "no other place is both quicker and small enough"
    else:
        gain = 1 - best.cost / first.cost
        why = f"a step is {gain:.0%} shorter than {first.name}{_counted([best], first)}: "
        why += _reason(best, first, replica_ranks)
    more = best.peak_bytes - min(mode.peak_bytes for mode in possible)
    if more > 0:
        why += f"; its fullest rank needs {more / 2**30:.2f} GiB more than the leanest mode's"
    if not fitting:
        why += f"; no mode fits into {(device_bytes or 0) / 2**30:.1f} GiB"
    elif cheapest is not best:
        gain = 1 - cheapest.cost / best.cost
        why += (
            f"; {cheapest.name} would be {gain:.0%} shorter still but does not fit, unless "
            "model.image_encoder.recompute_granularity or a smaller batch makes room"
        )
    return Advice(mode=best.name, why=why + ".")


def _counted(modes: list[ModeForecast], other: ModeForecast) -> str:
    """That times are compared rank by rank, where a mode takes more or fewer ranks than the other one."""
    return ", its further ranks counted" if any(mode.ranks != other.ranks for mode in modes) else ""


def _simplest(modes: list[ModeForecast]) -> ModeForecast:
    """The first whose step is about as cheap as the cheapest."""
    cheapest = min(mode.cost for mode in modes)
    return next(mode for mode in modes if mode.cost <= cheapest * (1 + NOT_WORTH_IT))


def _reason(best: ModeForecast, first: ModeForecast, replica_ranks: int) -> str:
    if best.layout.split()[0] == first.layout.split()[0] and not first.layout.startswith("inline"):
        return "its ranks exchange less inside the encoder, or fewer of them lack an image"
    if best.layout.startswith("ahead"):
        return (
            f"inside the first stage the encoder costs ranks {first.idle:.0%} of the step, ahead of the pipeline its "
            f"images are spread over all {replica_ranks} ranks of a replica"
        )
    if best.layout.startswith("apart"):
        return "on ranks of its own the encoder works while the pipeline does"
    return "ranks that encode whole images exchange nothing inside the encoder"
