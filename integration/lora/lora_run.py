"""Our side: tiny models of the zoo with adapters, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import proof
import torch
from cases import CASES
from lora_cases import LORA, RUNS, LoraCase
from lora_reference import LoraReference
from safetensors.torch import load_file, save_file

from loongforge.ckpt.verify.batch import make_batch
from loongforge.ckpt.verify.difference import Side
from loongforge.core.checkpoint.directory import RunDirectory
from loongforge.core.config.resolve import resolve
from loongforge.core.config.run import RunConfig
from loongforge.core.plan import Plan
from loongforge.core.testing import run_distributed

ADAPTER = "adapter_model.safetensors"


class Shelf:
    """One directory for each case below `scratch`; everything in it is made when first asked for."""

    def __init__(self, reference: LoraReference, scratch: Path) -> None:
        self.reference, self._scratch = reference, scratch

    def base(self, name: str) -> Path:
        """The Hugging Face directory of a case of the zoo."""
        directory = self._scratch / name / "base"
        if not directory.exists():
            self.reference.write(name, directory)
        return directory

    def adapter(self, name: str) -> Path:
        """Random adapters of the case as we write them."""
        directory = self._scratch / name / "adapter"
        if not directory.exists():
            case = LORA[name]
            plan = Plan.of(config_of(case, self.base(case.zoo), "one", *case.flags), 1)
            write_adapter(plan, directory)
        return directory

    def expected(self, name: str) -> Side:
        """What the reference computes."""
        out = self._scratch / name / "reference.safetensors"
        case = LORA[name]
        base, batch = self.base(case.zoo), self._scratch / name / "batch.safetensors"
        loss = self._scratch / name / "loss"
        if not out.exists():
            adapter = self.adapter(name)
            save_file(make_batch(config_of(case, base, "one"), proof.SEQUENCES), batch)
            seen = self.reference.adapted(case.zoo, base, adapter, batch, out, by_peft=case.by_peft)
            loss.write_text(repr(seen))
        tensors = load_file(out)
        return Side(loss=float(loss.read_text()), logits=tensors.pop("logits"), gradients=tensors)


def config_of(
    case: LoraCase, base: Path, layout: str, *flags: str, steps: int = 3, precision: str = "fp32"
) -> RunConfig:
    """A short run from `base`; later flags win."""
    words = ["--load", base, f"--{precision}", "--seq-length", proof.LENGTH, "--micro-batch-size", 1]
    words += ["--global-batch-size", proof.SEQUENCES, "--train-iters", steps, *CASES[case.zoo].flags]
    return resolve(list(map(str, [*words, *RUNS[layout][0], *flags])), note=lambda _: None)


def write_adapter(plan: Plan, directory: Path) -> None:
    """The adapters of a plan with random numbers: B is not zero, so that nothing hides behind it.

    B A changes a matrix by about a third of its size: more makes a tiny model sensitive to rounding.
    """
    import json

    from loongforge.ckpt.peft.config import written
    from loongforge.core.lora.targets import AdapterSet, inventory_of

    generator = torch.Generator().manual_seed(11)
    tensors: dict[str, torch.Tensor] = {}
    for one in plan.adapters:
        for module in one.matrix.names:
            for side, shape in (("A", (one.rank, one.matrix.inputs)), ("B", (one.matrix.outputs, one.rank))):
                name = f"base_model.model.{module}.lora_{side}.weight"
                tensors[name] = (0.2 if side == "A" else 0.05) * torch.randn(shape, generator=generator)
    directory.mkdir(parents=True)
    save_file(tensors, directory / ADAPTER, metadata={"format": "pt"})
    said = written(AdapterSet(base=None, adapters=plan.adapters, modules=inventory_of(plan).modules))
    (directory / "adapter_config.json").write_text(json.dumps(said))


def measure(config: RunConfig, world: int, scratch: Path) -> Side:
    """Logits, loss and the gradient of every A and B."""
    from loongforge.ckpt.verify.difference import ours

    scratch.mkdir(parents=True, exist_ok=True)
    run_distributed(partial(_measure, config=config, scratch=scratch), world)
    return ours(Plan.of(config, world), scratch)


def _measure(worker: Any, config: RunConfig, scratch: Path) -> None:
    from loongforge.ckpt.verify.measure import measure_part
    from loongforge.ckpt.workers import part_of

    with part_of(config) as part:
        proof._load(part)
        measure_part(part, scratch)


def train(
    config: RunConfig,
    world: int,
    batches: Sequence[dict[str, torch.Tensor]],
    scratch: Path,
    look: Callable[[Any, Any], Any] | None = None,
) -> list[Any]:
    """One step for each batch, then an export to `scratch`; losses and norms, and what `look` says, by rank."""
    return run_distributed(partial(_train, config=config, batches=batches, scratch=scratch, look=look), world)


def _train(worker: Any, config: RunConfig, batches: Any, scratch: Path, look: Any) -> Any:
    from loongforge.ckpt.verify.batch import rows_of
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.step.forward import train_step
    from loongforge.core.step.optimizer import build_training, gather_parameters

    seen = []
    with part_of(config) as part:
        proof._load(part)
        training = build_training(part.plan, part.world, part.model)
        for step, batch in enumerate(batches):
            rows = rows_of(part.plan, part.world.dp.rank())
            mine = [{name: tensor[row] for name, tensor in batch.items()} for row in rows]
            result = train_step(part.plan, part.world, training, mine, step)
            seen.append((result.loss, result.grad_norm))
        gather_parameters(training.chunks)
        export_hf(part.plan, part.world, part.model, scratch)
        said = look(part, training) if look else None
    return seen, said


def notes_of(config: RunConfig) -> list[str]:
    """What loading says, in one process."""
    return run_distributed(partial(_notes, config=config), 1)[0]


def _notes(worker: Any, config: RunConfig) -> list[str]:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.load import load_weights
    from loongforge.core.checkpoint.start import find_start

    with part_of(config) as part:
        return load_weights(part.plan, part.world, part.model, find_start(config.checkpoint))


def through_checkpoint(config: RunConfig, layouts: tuple[RunConfig, int], world: int, out: Path) -> None:
    """Load, save a checkpoint of ours, read it in another layout, export from there to `out`."""
    other, size = layouts
    assert config.checkpoint.save is not None, "the test gives a directory"
    run_distributed(partial(_save, config=config), world)
    checkpoint = RunDirectory(Path(config.checkpoint.save)).latest()
    assert checkpoint is not None
    run_distributed(partial(_export, config=other, checkpoint=checkpoint, out=out), size)


def _save(worker: Any, config: RunConfig) -> None:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.save import Saver
    from loongforge.core.step.optimizer import build_training

    with part_of(config) as part:
        proof._load(part)
        Saver(part.plan, part.world, fingerprint={}).save(build_training(part.plan, part.world, part.model), 1, 0)


def _export(worker: Any, config: RunConfig, checkpoint: Path, out: Path) -> None:
    from loongforge.ckpt.workers import part_of
    from loongforge.core.checkpoint.export import export_hf
    from loongforge.core.checkpoint.load import load_model

    with part_of(config) as part:
        load_model(part.world, part.model, checkpoint)
        export_hf(part.plan, part.world, part.model, out)
