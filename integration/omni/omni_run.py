"""Run the trainer on given images and text in a given layout, and transformers on the same sequences one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_vlm import END, IMAGE, START, VIDEO

from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig
from loongforge.core.testing import run_distributed

LENGTH = 48
MERGE, PATCH_DIM = 2, 3 * 2 * 4 * 4
Tensors = dict[str, torch.Tensor]
Grid = tuple[int, int, int]

MIXES: dict[str, list[list[tuple[str, Grid]]]] = {
    # Images of unequal size, two in one sequence, text alone, a video.
    "mixed": [
        [("image", (1, 4, 6))],
        [("image", (1, 2, 2)), ("image", (1, 6, 4))],
        [],
        [("video", (2, 4, 4))],
    ],
    "no image": [[], [], [], []],
    "one huge": [[], [("image", (1, 8, 12))], [], []],
    "everywhere": [[("image", (1, 4, 4))], [("image", (1, 2, 6))], [("image", (1, 4, 2))], [("image", (1, 6, 6))]],
}
"""What each of the four sequences of a step shows."""


@dataclass(frozen=True, kw_only=True)
class Sequence_:
    """One sequence and what it shows."""

    tokens: torch.Tensor
    """int64 `[1, LENGTH]`."""
    labels: torch.Tensor
    loss_mask: torch.Tensor
    kinds: torch.Tensor
    """int64 `[1, LENGTH]`: 0 text, 1 image, 2 video."""
    items: list[tuple[str, Grid]]
    pixels: list[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Loss and gradients of one step."""

    loss: float
    tokens: int
    tensors: Tensors
    """By Hugging Face name."""
    logits: tuple[torch.Tensor, ...] = ()
    """Of each sequence, where they were asked for."""


def sequence(items: list[tuple[str, Grid]], seed: int) -> Sequence_:
    """Random text with the items' placeholders near its beginning."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 120, (LENGTH + 1,), generator=generator)
    kinds = torch.zeros(LENGTH, dtype=torch.int64)
    at = 2
    for kind, (t, h, w) in items:
        count = t * h * w // MERGE**2
        # A video of Qwen3-VL has its frames apart, with text between; Qwen2.5-VL's stands in one piece. One frame's
        # worth at a time suits both where positions are given.
        for part in [count // t] * t if kind == "video" else [count]:
            text[at] = START
            text[at + 1 : at + 1 + part] = IMAGE if kind == "image" else VIDEO
            kinds[at + 1 : at + 1 + part] = 1 if kind == "image" else 2
            text[at + 1 + part] = END
            at += part + 3
    assert at <= LENGTH, "the sequence is long enough for its images"
    mask = (torch.rand(LENGTH, generator=generator) < 0.8).float()
    labels = text[1:].clone()
    mask[(labels == IMAGE) | (labels == VIDEO)] = 0.0
    pixels = [torch.randn(t * h * w, PATCH_DIM, generator=generator) for _, (t, h, w) in items]
    return Sequence_(
        tokens=text[None, :-1].clone(), labels=labels[None], loss_mask=mask[None], kinds=kinds[None], items=items,
        pixels=pixels,
    )  # fmt: skip


@cache
def sequences(mix: str) -> tuple[Sequence_, ...]:
    """The four sequences of a step."""
    return tuple(sequence(items, seed) for seed, items in enumerate(MIXES[mix]))


def position_ids(one: Sequence_, rank: int) -> torch.Tensor:
    """int64 `[rank, 1, LENGTH]`, image by image and frame by frame, as transformers counts (each frame t=1)."""
    if rank == 1:
        return torch.arange(LENGTH)[None, None]
    frames: list[Grid] = [(1, h, w) for _, (t, h, w) in one.items for _ in range(t)]
    ids = torch.zeros(3, LENGTH, dtype=torch.int64)
    kinds, at, next_id = one.kinds[0].tolist(), 0, 0
    while at < LENGTH:
        if not kinds[at]:
            ids[:, at] = next_id
            at, next_id = at + 1, next_id + 1
            continue
        _, h, w = frames.pop(0)
        h, w = h // MERGE, w // MERGE
        ids[0, at : at + h * w] = next_id
        ids[1, at : at + h * w] = next_id + torch.arange(h).repeat_interleave(w)
        ids[2, at : at + h * w] = next_id + torch.arange(w).repeat(h)
        at, next_id = at + h * w, next_id + max(h, w)
    return ids[:, None]


def batch(some: Sequence[Sequence_], first: int, rank: int) -> dict[str, Any]:
    """A micro-batch as the loader hands it out."""
    kinds = torch.cat([one.kinds for one in some])
    positions = torch.cat([position_ids(one, rank) for one in some], 1)
    made: dict[str, Any] = {
        "tokens": torch.cat([one.tokens for one in some]),
        "labels": torch.cat([one.labels for one in some]),
        "loss_mask": torch.cat([one.loss_mask for one in some]),
        "position_ids": positions[0] if rank == 1 else positions,
        "sample_ids": torch.arange(first, first + len(some)),
        "grid": torch.tensor([grid for one in some for _, grid in one.items], dtype=torch.int64).view(-1, 3),
        "visual_positions": torch.from_numpy(np.flatnonzero(kinds.numpy().reshape(-1))),
        "items_of": torch.tensor([len(one.items) for one in some]),
    }
    if pixels := [patches for one in some for patches in one.pixels]:
        made["pixels"] = torch.cat(pixels)
    return made


def config_of(load: Path | None, flags: Sequence[str], *, mbs: int = 1, gbs: int = 4) -> RunConfig:
    """An fp32 run of three steps."""
    shape = ["--seq-length", LENGTH, "--micro-batch-size", mbs, "--global-batch-size", gbs, "--train-iters", 3]
    given = ["--load", str(load)] if load else []
    return resolve([*given, "--fp32", *map(str, shape), *flags])


def my_batches(part: Any, mix: str) -> list[dict[str, Any]]:
    """Micro-batches of this rank's foundation replica."""
    plan, world = part.plan, part.world
    rank, size, mbs = plan.geometry.position_rank, world.dp.size(), plan.micro_batch_size
    every = sequences(mix)[: plan.global_batch_size]
    groups = [batch(every[first : first + mbs], first, rank) for first in range(0, len(every), mbs)]
    mine = groups[world.dp.rank() :: size]
    assert len(mine) == plan.num_microbatches, "the test gives a whole global batch"
    return mine


def gradients(config: RunConfig, world: int, mix: str, scratch: Path) -> Measured:
    """Loss and every gradient of one step."""
    out = scratch / "gradients"
    seen = run_distributed(partial(_gradients, config=config, mix=mix, out=out), world)
    assert all(one == seen[0] for one in seen), "all ranks know the same loss"
    return Measured(loss=seen[0][0], tokens=seen[0][1], tensors=read(out))


def steps(config: RunConfig, world: int, mixes: Sequence[str], scratch: Path) -> tuple[list[Any], Tensors]:
    """Train over a step for each mix; what every step measured, and the weights after them."""
    out = scratch / "weights"
    seen = run_distributed(partial(_steps, config=config, mixes=mixes, out=out), world)
    return seen[0], read(out)


class OneProcess:
    """What one process computes, each once however many layouts are compared with it."""

    def __init__(self, checkpoints: dict[str, Path], scratch: Path) -> None:
        self._checkpoints, self._scratch = checkpoints, scratch
        self._gradients: dict[tuple[str, str, int], Measured] = {}
        self._steps: dict[tuple[str, ...], tuple[list[Any], Tensors]] = {}

    def gradients(self, mix: str, family: str = "qwen3_vl", gbs: int = 4) -> Measured:
        """Loss and every gradient of one step."""
        key = (mix, family, gbs)
        if key not in self._gradients:
            config = config_of(self._checkpoints[family], [], gbs=gbs)
            self._gradients[key] = gradients(config, 1, mix, self._scratch / "-".join(map(str, key)).replace(" ", "-"))
        return self._gradients[key]

    def steps(self, flags: Sequence[str], mixes: Sequence[str], family: str = "qwen3_vl") -> tuple[list[Any], Tensors]:
        """What every step measured, and the weights after them."""
        key = (family, *flags, *mixes)
        if key not in self._steps:
            scratch = self._scratch / f"steps-{len(self._steps)}"
            self._steps[key] = steps(config_of(self._checkpoints[family], flags), 1, mixes, scratch)
        return self._steps[key]


def logits(config: RunConfig, mix: str) -> list[torch.Tensor]:
    """Logits of each sequence, `[LENGTH, vocabulary]`, in one process."""
    return run_distributed(partial(_logits, config=config, mix=mix), 1)[0]


def _logits(worker: Any, config: RunConfig, mix: str) -> list[torch.Tensor]:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.step.batch import to_device

    found: list[torch.Tensor] = []
    with part_of(config) as part:
        training, batches = built(part), my_batches(part, mix)
        training.feed.start(batches)
        for number, one in enumerate(batches):
            moved, visual = to_device(one, part.world), training.feed.visual(number)
            seen = training.chunks[0](moved.tokens, position_ids=moved.position_ids, visual=visual)
            found.append(seen[0].detach())
    return found


def built(part: Any) -> Any:
    """The training of this part, from the weights of `--load`."""
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start
    from loongforge.core.step.optimizer import build_training

    load_weights(part.plan, part.world, part.model, find_start(part.plan.config.checkpoint))
    return build_training(part.plan, part.world, part.model)


def _gradients(worker: Any, config: RunConfig, mix: str, out: Path) -> tuple[float, int]:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.step.forward import forward_backward

    with part_of(config) as part:
        training = built(part)
        for wrapped in training.wrapped:
            wrapped.zero_grad_buffer()
        seen = forward_backward(
            part.plan, part.world, training.chunks, my_batches(part, mix), training.feed, forward_only=False
        )
        with torch.no_grad():
            for modules in part.model.modules.values():
                for module in modules:
                    for parameter in module.parameters():
                        # The export maps gradients as it maps parameters.
                        parameter.copy_(parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter))
        export_hf(part.plan, part.world, part.model, out)
    return seen


def _steps(worker: Any, config: RunConfig, mixes: Sequence[str], out: Path) -> list[Any]:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import gather_parameters

    with part_of(config) as part:
        training = built(part)
        results = [
            train_step(part.plan, part.world, training, my_batches(part, mix), step) for step, mix in enumerate(mixes)
        ]
        gather_parameters(training.wrapped)
        export_hf(part.plan, part.world, part.model, out)
    return results


def transformers_alone(directory: Path, mix: str, adapter: Path | None = None) -> Measured:
    """transformers on each sequence by itself: mean loss over all unmasked tokens, and its gradients as it saves.

    With an adapter by PEFT: the gradients of every A and B, by their names in the file.
    """
    import transformers as hf

    model = hf.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
    every = sequences(mix)
    count = sum(float(one.loss_mask.sum()) for one in every)
    total = 0.0
    seen: list[torch.Tensor] = []
    for one in every:
        inputs: dict[str, Any] = {
            "input_ids": one.tokens, "mm_token_type_ids": one.kinds, "position_ids": position_ids(one, 3),
        }  # fmt: skip
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw")
        ):  # fmt: skip
            if chosen := [number for number, (name, _) in enumerate(one.items) if name == kind]:
                inputs[pixels] = torch.cat([one.pixels[number] for number in chosen])
                inputs[grid] = torch.tensor([one.items[number][1] for number in chosen])
        logits = model(**inputs).logits
        seen.append(logits[0].detach())
        losses = torch.nn.functional.cross_entropy(logits[0], one.labels[0], reduction="none")
        loss = (losses * one.loss_mask[0]).sum() / count
        loss.backward()
        total += loss.item()
    if adapter is not None:
        found = {name.replace(".default", ""): one.grad for name, one in model.named_parameters() if one.requires_grad}
        return Measured(loss=total, tokens=int(count), tensors=found, logits=tuple(seen))
    scratch = directory.parent / f"{directory.name}-{mix}-gradients".replace(" ", "-")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    model.save_pretrained(scratch)
    return Measured(loss=total, tokens=int(count), tensors=read(scratch), logits=tuple(seen))


def read(directory: Path) -> Tensors:
    """Every tensor of a Hugging Face directory and those below it, fp32."""
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for file in sorted(directory.rglob("*.safetensors")):
        tensors |= {name: tensor.float() for name, tensor in load_file(file).items()}
    assert tensors, f"nothing in {directory}"
    return tensors


def worst(left: Tensors, right: Tensors) -> tuple[float, str]:
    """Largest difference of an entry relative to its tensor's largest entry (floored at 1e-4 of all), and where."""
    assert left.keys() == right.keys(), sorted(left.keys() ^ right.keys())[:8]
    floor = 1e-4 * max(float(tensor.abs().max()) for tensor in right.values())
    return max(
        (float((left[name] - tensor).abs().max()) / max(floor, float(tensor.abs().max())), name)
        for name, tensor in right.items()
    )
