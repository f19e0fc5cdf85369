"""Tensor and pipeline parallelism give the loss and the gradients of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loongforge.core import env
from loongforge.core.config.run import ParallelConfig
from loongforge.core.testing.conformance.subject import Case, Subject, part_of
from loongforge.core.testing.conformance.transformers_side import BATCH, LOGITS
from loongforge.core.testing.distributed import run_distributed

LAYOUTS = {
    "one": ParallelConfig(),
    "tp2": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline_model_parallel_size=2),
}

TOLERANCE = 1e-4
"""Relative to a tensor's largest entry, fp32. Right families are measured below 5e-6, mistakes above 1e-2."""

FLOOR = 1e-4
"""A gradient smaller than this part of the model's largest one is measured on that scale: beneath it is rounding."""


def agree(subject: Subject) -> str:
    """Run every layout from the same weights and compare with one process."""
    worst = 0.0
    for case in subject.cases:
        losses = {layout: measure(subject, case, layout) for layout in LAYOUTS}
        for layout in ("tp2", "pp2"):
            assert abs(losses[layout] - losses["one"]) <= TOLERANCE * losses["one"], (
                f"{case.label} model, {layout}: loss {losses[layout]:.6f}, in one process {losses['one']:.6f}"
            )
            worst = max(worst, gradients_agree(subject, case, gradients(case, layout), f"{layout} and one process"))
    return f"tp2 and pp2 as one process, gradients within {worst:.1e}"


def gradients(case: Case, side: str) -> Path:
    """Directory where a side leaves its gradients, in Hugging Face layout."""
    return case.directory / f"gradients-{side}"


def measure(subject: Subject, case: Case, layout: str) -> float:
    """Loss of a layout; it leaves its gradients, and one process its logits too."""
    parallel = LAYOUTS[layout]
    world = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    return run_distributed(lambda worker: _measure(subject, case, layout, worker), world)[0]


def _measure(subject: Subject, case: Case, layout: str, worker: env.Worker) -> float:
    from megatron.core.distributed import finalize_model_grads

    from loongforge.core.step.forward import forward_backward
    from loongforge.core.step.optimizer import wrap

    with part_of(subject.run(case, LAYOUTS[layout]), worker) as part:
        part.load(case.weights)
        batches = part.batches()
        wrapped = wrap(part.plan, part.world, part.chunks)
        # What the optimizer's construction does for a run: reduce shared and sequence-split gradients at the end.
        wrapped[0].config.finalize_model_grads_func = finalize_model_grads
        for chunk in wrapped:
            chunk.eval()  # no dropout on any side
            chunk.zero_grad_buffer()
        if layout == "one":
            _leave_output(part, batches, case.directory)
        loss, _ = forward_backward(part.plan, part.world, wrapped, batches, forward_only=False)
        with torch.no_grad():
            for parameter in part.parameters().values():
                if parameter.requires_grad:
                    parameter.copy_(vars(parameter)["main_grad"])
                else:
                    parameter.zero_()  # a family may have parts that no loss reaches
        part.save(gradients(case, layout))  # the weight table maps gradients as it maps weights
        return loss


@torch.no_grad()
def _leave_output(part: Any, batches: list[Any], directory: Path) -> None:
    (chunk,) = part.chunks
    logits = [chunk(batch["tokens"], position_ids=batch["position_ids"]).float() for batch in batches]
    names = ("tokens", "labels", "loss_mask")
    torch.save({name: torch.cat([batch[name] for batch in batches]) for name in names}, directory / BATCH)
    torch.save(torch.cat(logits), directory / LOGITS)


def gradients_agree(subject: Subject, case: Case, other: Path, sides: str) -> float:
    """Worst difference between the gradients in `other` and those of one process; `AssertionError` when too large."""
    (found,) = run_distributed(lambda worker: _differences(subject, case, other, worker), 1)
    name, worst = max(found.items(), key=lambda item: item[1])
    assert worst <= TOLERANCE, (
        f"{case.label} model: the gradients of {sides} differ by {worst:.1e} of the largest entry in {name!r}"
    )
    return worst


@torch.no_grad()
def _differences(subject: Subject, case: Case, other: Path, worker: env.Worker) -> dict[str, float]:
    with part_of(subject.run(case), worker) as part:
        part.load(gradients(case, "one"))
        ours = {name: parameter.clone() for name, parameter in part.parameters().items()}
        part.load(other)
        floor = FLOOR * max(float(tensor.abs().max()) for tensor in ours.values())
        return {
            name: float((theirs - ours[name]).abs().max()) / max(floor, float(ours[name].abs().max()))
            for name, theirs in part.parameters().items()
        }
