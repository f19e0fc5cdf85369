"""Our side: what one worker computes and writes down."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from loongforge.ckpt.hf.save import save
from loongforge.ckpt.verify.batch import make_batch, rows_of
from loongforge.ckpt.workers import Part, part_of
from loongforge.core.checkpoint.contract import WeightMove
from loongforge.core.config.run import RunConfig

Batch = Mapping[str, torch.Tensor]


def measure(config: RunConfig, scratch: str) -> None:
    """Load the directory, run the batch forward and backward as the trainer does, leave the results in `scratch`.

    `loss.json` from rank 0, `logits-DP-CP-TP.safetensors` from the last stage, `gradients/` in Hugging Face layout.
    """
    with part_of(config) as part:
        from loongforge.core.checkpoint.load import load_weights
        from loongforge.core.checkpoint.start import find_start

        load_weights(part.plan, part.world, part.model, find_start(config.checkpoint))
        measure_part(part, Path(scratch))


def measure_part(part: Part, scratch: Path) -> None:
    """The same for a part whose weights are loaded; afterwards gradients stand in their place."""
    from loongforge.core.step.forward import forward_backward
    from loongforge.core.step.optimizer import build_training

    plan, world = part.plan, part.world
    batch = make_batch(plan.config, plan.global_batch_size)
    mine: list[Batch] = [
        {name: tensor[rows] for name, tensor in batch.items()} for rows in rows_of(plan, world.dp.rank())
    ]
    training = build_training(plan, world, part.model)
    for chunk in training.chunks:
        chunk.eval()  # no dropout on either side
        chunk.zero_grad_buffer()
    _write_logits(part, training.chunks, mine, scratch)
    loss, tokens = forward_backward(plan, world, training.chunks, mine, forward_only=False)
    if world.is_main:
        (scratch / "loss.json").write_text(json.dumps({"loss": loss, "tokens": tokens}))
    write_gradients(part, scratch / "gradients")


def _write_logits(part: Part, chunks: list[Any], batches: list[Batch], scratch: Path) -> None:
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from safetensors.torch import save_file

    from loongforge.core.step.batch import to_device

    def forward_step(source: Iterator[Batch], chunk: Any) -> tuple[torch.Tensor, Any]:
        batch = to_device(next(source), part.world)
        output = chunk(batch.tokens, position_ids=batch.position_ids, packed=batch.packed)
        return output, lambda logits, non_loss_data: logits.float().cpu()

    interleaved = part.plan.layout.vpp is not None
    iterators = [iter(batches) for _ in chunks]
    with torch.no_grad():
        logits = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if interleaved else iterators[0],
            model=chunks if interleaved else chunks[0],
            num_microbatches=len(batches),
            seq_length=part.plan.seq_length,
            micro_batch_size=part.plan.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    world = part.world
    if world.is_last_stage:
        name = f"logits-{world.dp.rank()}-{world.cp.rank()}-{world.tp.rank()}.safetensors"
        save_file({"logits": torch.cat(logits).contiguous()}, scratch / name)


@torch.no_grad()
def write_gradients(part: Part, path: Path) -> None:
    """Put every gradient in place of its parameter and write an export: the weight table maps both alike.

    Of a model with adapters those alone have gradients, and they alone are written, as PEFT does.
    """
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.checkpoint.parts import parts_of

    for chunk in part.model.chunks:
        parameters: list[Any] = list(chunk.parameters())
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.copy_(parameter.main_grad)
            elif not part.plan.adapters:
                parameter.zero_()  # an indexer that no loss teaches
    if part.plan.adapters:
        export_hf(part.plan, part.world, part.model, path)
        return
    parts = parts_of(part.plan, part.world, part.model.chunks, part.model.tower)
    config = part.plan.config.model.foundation.geometry.to_hf()
    save(WeightMove(path=path, parts=parts, world=part.world, config=config))
