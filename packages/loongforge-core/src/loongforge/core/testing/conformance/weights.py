"""The weight table and what training does with the weights, in one process."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import torch

from loongforge.core import env
from loongforge.core.model.weights import Rule
from loongforge.core.testing.conformance.subject import STEPS, Case, Part, Subject, part_of
from loongforge.core.testing.distributed import run_distributed


def table_is_complete(subject: Subject) -> str:
    """Every parameter has one rule, and every rule a parameter or Hugging Face tensors that other rules move."""
    counts: list[str] = []
    for case in subject.cases:
        (found,) = run_distributed(lambda worker, case=case: _table(subject, case, worker), 1)
        parameters, rules, problems = found
        assert not problems, f"{case.label} model: " + "; ".join(problems)
        counts.append(f"{case.label}: {parameters} parameters, {rules} rules")
    return ", ".join(counts)


def _table(subject: Subject, case: Case, worker: env.Worker) -> tuple[int, int, list[str]]:
    with part_of(subject.run(case), worker) as part:
        names = list(part.parameters())
        buffers = [name for chunk in part.chunks for name, _ in chunk.named_buffers()]
        return len(names), len(part.table.rules), table_problems(names, buffers, part.table.rules)


def table_problems(names: list[str], buffers: list[str], rules: tuple[Rule, ...]) -> list[str]:
    """What a table lacks or has too much of. A rule may name a buffer; a buffer needs none."""
    patterns = {rule.megatron: re.compile(_pattern(rule.megatron)) for rule in rules}
    problems: list[str] = []
    used: set[str] = set()
    for name in [*names, *buffers]:
        hits = [target for target, pattern in patterns.items() if pattern.fullmatch(name)]
        used |= set(hits)
        if not hits and name in names:
            problems.append(f"parameter {name!r} has no rule in the weight table")
        elif len(hits) > 1:
            problems.append(f"parameter {name!r} has several rules: {', '.join(map(repr, hits))}")
    moved = {tensor for rule in rules if rule.megatron in used for tensor in hf_tensors(rule)}
    # A rule may stand for a platform that names a parameter otherwise, or for a tied head: it moves nothing new.
    problems += [
        f"rule {rule.megatron!r} names no parameter, and nothing else moves {', '.join(map(repr, unmoved))}"
        for rule in rules
        if rule.megatron not in used and (unmoved := [one for one in hf_tensors(rule) if one not in moved])
    ]
    return problems


def hf_tensors(rule: Rule) -> tuple[str, ...]:
    """Names of the Hugging Face tensors behind a rule, of whatever kind."""
    values: list[Any] = [getattr(rule, field.name) for field in fields(rule) if field.name != "megatron"]
    return tuple(value for value in values if isinstance(value, str))


def _pattern(template: str) -> str:
    return re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(template))


def round_trip_is_exact(subject: Subject) -> str:
    """Random weights, written and read into another model, are the same to the last bit."""
    for case in subject.cases:
        (changed,) = run_distributed(lambda worker, case=case: _round_trip(subject, case, worker), 1)
        assert not changed, f"{case.label} model: written and read again, these differ: {', '.join(changed)}"
    return "bit-exact for random weights"


@torch.no_grad()
def _round_trip(subject: Subject, case: Case, worker: env.Worker) -> list[str]:
    with part_of(subject.run(case), worker) as part:
        randomise(part)
        written = {name: parameter.clone() for name, parameter in part.parameters().items()}
        part.save(case.weights)
        for parameter in part.parameters().values():
            parameter.fill_(torch.nan)  # so that what is not read shows
        part.load(case.weights)
        return [name for name, now in part.parameters().items() if not torch.equal(now, written[name])]


def randomise(part: Part) -> None:
    """Weights under which a mistake shows: fresh norms are all one, and fresh attention is nearly uniform."""
    generator = torch.Generator().manual_seed(1)
    for parameter in part.parameters().values():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter.add_(0.3 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def training_learns(subject: Subject) -> str:
    """Fresh weights: every trainable parameter has a finite, non-zero gradient, and one batch can be learnt."""
    seen: list[str] = []
    for case in subject.cases:
        ((idle, losses),) = run_distributed(lambda worker, case=case: _train(subject, case, worker), 1)
        assert not idle, f"{case.label} model: no gradient, or one that is not finite, reaches {', '.join(idle)}"
        assert losses[-1] < 0.9 * losses[0], (
            f"{case.label} model: {len(losses)} steps on one batch bring the loss from {losses[0]:.3f} to "
            f"{losses[-1]:.3f}; a model that can learn falls below nine tenths"
        )
        seen.append(f"{case.label}: loss {losses[0]:.3f} to {losses[-1]:.3f} in {len(losses)} steps")
    return ", ".join(seen)


def _train(subject: Subject, case: Case, worker: env.Worker) -> tuple[list[str], list[float]]:
    from loongforge.core.model.build import build_model
    from loongforge.core.step.forward import forward_backward, train_step
    from loongforge.core.step.optimizer import build_training

    with part_of(subject.run(case), worker) as part:
        training = build_training(part.plan, part.world, build_model(part.plan, part.world))
        batches = part.batches()
        training.chunks[0].zero_grad_buffer()
        forward_backward(part.plan, part.world, training.chunks, batches, forward_only=False)
        idle = [
            name.removeprefix("module.")
            for name, parameter in training.chunks[0].named_parameters()
            if parameter.requires_grad and not has_gradient(parameter)
        ]
        if idle:
            return idle, []
        return [], [train_step(part.plan, part.world, training, batches, step).loss for step in range(2 * STEPS)]


def has_gradient(parameter: Any) -> bool:
    """Whether backward reached it with finite numbers that are not all zero."""
    gradient = parameter.main_grad
    return bool(gradient.isfinite().all()) and bool(gradient.any())
