"""How often the further layers of multi-token prediction say what the model itself says, with the text given.

Depth k proposes token i + k + 1 having seen those up to i + k; the model's own choice there is its most probable token
at place i + k. Speculative decoding (Leviathan et al., 2023) with greedy choice accepts exactly where both are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from loongforge.ckpt.workers import Part, part_of
from loongforge.core.config.run import RunConfig

Batch = Mapping[str, torch.Tensor]

STRETCHES = 8
"""Parts of a sequence by which acceptance is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """One model on one text."""

    rates: tuple[float, ...]
    """By depth: the share of places where it says what the model says."""
    chained: tuple[float, ...]
    """By depth: the share where it and all depths before it do."""
    mean_length: float
    """Tokens that one pass of the model yields on average: its own, and those accepted before the first difference."""
    tokens: int
    """Places where all depths propose."""
    by_position: tuple[tuple[int, int, tuple[float, ...]], ...]
    """First and last place of a stretch of a sequence, and the rates of every depth there."""


def measure(config: RunConfig, answer: str) -> None:
    """One worker: load, read one global batch, count; rank 0 writes the counts to the file `answer`."""
    with part_of(config) as part:
        from loongforge.core.checkpoint.load import load_model, load_weights
        from loongforge.core.checkpoint.start import Start, find_start
        from loongforge.core.data.open import open_data

        start = find_start(config.checkpoint)
        if start.checkpoint is not None:
            load_model(part.world, part.model, start.checkpoint)
        else:
            load_weights(part.plan, part.world, part.model, start)
        with open_data(part.plan, part.world, Start()).loader(0) as loader:
            micro_batches = loader.step()
        counts = count(part, micro_batches)
        if part.world.is_main:
            torch.save(counts, Path(answer))


def count(part: Part, micro_batches: Sequence[Batch]) -> torch.Tensor:
    """Counts of all ranks' micro-batches, fp64 `[D, STRETCHES + 2, 2]`, hits and places: by stretch of the sequence,
    then of the depth with all before it, then the same where all depths propose. Collective, equal on all ranks."""
    plan, world = part.plan, part.world
    depths = plan.geometry.prediction_layers
    sums = torch.zeros(depths, STRETCHES + 2, 2, dtype=torch.float64, device=world.device)
    for batch, chosen in zip(micro_batches, _chosen(part, micro_batches), strict=False):
        if world.tp.rank() == 0:
            sums += _counted(batch, chosen.cpu(), depths).to(world.device)
    if world.size > 1:
        dist.all_reduce(sums)
    return sums.cpu()


def summary(counts: torch.Tensor, seq_length: int) -> Acceptance:
    """What the counts say."""
    share = (counts[..., 0] / counts[..., 1].clamp(min=1)).tolist()
    whole = counts[:, :STRETCHES].sum(1)
    edges = _edges(seq_length)
    return Acceptance(
        rates=tuple((whole[:, 0] / whole[:, 1].clamp(min=1)).tolist()),
        chained=tuple(row[STRETCHES] for row in share),
        mean_length=1 + sum(row[STRETCHES + 1] for row in share),
        tokens=int(counts[0, STRETCHES + 1, 1]),
        by_position=tuple(
            (edges[at], edges[at + 1] - 1, tuple(row[at] for row in share))
            for at in range(STRETCHES)
            if counts[0, at, 1]
        ),
    )


def _edges(seq_length: int) -> list[int]:
    return [-(-seq_length * at // STRETCHES) for at in range(STRETCHES + 1)]


def _counted(batch: Batch, chosen: torch.Tensor, depths: int) -> torch.Tensor:
    """Counts of one micro-batch from the tokens chosen, int64 `[1 + D, B, S]`."""
    from loongforge.core.step.batch import further_on

    batch = {**batch, "chosen": chosen[0]}
    own, masks = further_on(batch, "chosen", depths), further_on(batch, "loss_mask", depths)
    positions = batch["position_ids"]
    length = positions.size(-1)
    sums = torch.zeros(depths, STRETCHES + 2, 2, dtype=torch.float64)
    chain = torch.ones_like(chosen[0], dtype=torch.bool)
    proposed = torch.stack(masks).bool().all(0)
    for depth in range(depths):
        asked, hit = masks[depth].bool(), chosen[depth + 1] == own[depth]
        chain = chain & hit
        for at, (first, end) in enumerate(zip(_edges(length), _edges(length)[1:], strict=False)):
            here = asked & (positions >= first) & (positions < end)
            sums[depth, at] = torch.tensor([int((hit & here).sum()), int(here.sum())])
        sums[depth, STRETCHES] = torch.tensor([int((chain & asked).sum()), int(asked.sum())])
        sums[depth, STRETCHES + 1] = torch.tensor([int((chain & proposed).sum()), int(proposed.sum())])
    return sums


@torch.no_grad()
def _chosen(part: Part, micro_batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Most probable tokens of the model and of every depth, int64 `[1 + D, B, S]` a micro-batch; last stage only."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from loongforge.core.step.batch import to_device

    plan, world = part.plan, part.world

    def forward_step(source: Iterator[Batch], chunk: Any) -> tuple[torch.Tensor, Any]:
        batch = to_device(next(source), world, plan.geometry.prediction_layers)
        output = chunk(batch.tokens, position_ids=batch.position_ids, packed=batch.packed, ahead=batch.ahead)
        return output, lambda logits, non_loss_data: _greedy(logits, world.tp)

    chunks: list[Any] = part.model.chunks
    for chunk in chunks:
        chunk.eval()
    interleaved = plan.layout.vpp is not None
    iterators = [iter(micro_batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=chunks if interleaved else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=plan.seq_length,
        micro_batch_size=plan.micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )


def _greedy(logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Logits `[..., V / tp]` to the most probable token over all tensor parallel ranks; of equal ones the first."""
    best, place = logits.float().max(-1)
    place = place + group.rank() * logits.size(-1)
    if group.size() == 1:
        return place
    every = [(torch.empty_like(best), torch.empty_like(place)) for _ in range(group.size())]
    dist.all_gather([one for one, _ in every], best.contiguous(), group=group)
    dist.all_gather([one for _, one in every], place.contiguous(), group=group)
    winner = torch.stack([one for one, _ in every]).argmax(0, keepdim=True)
    return torch.stack([one for _, one in every]).gather(0, winner)[0]
