"""Write checkpoints: at intervals, at the end, on request; in the foreground or behind the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from loongforge.core.checkpoint import write
from loongforge.core.checkpoint.directory import Manifest, RunDirectory
from loongforge.core.checkpoint.state import layout_facts, lora_facts, random_object, training_state
from loongforge.core.errors import CheckpointError, TrainingError
from loongforge.core.megatron.groups import World
from loongforge.core.plan import Plan
from loongforge.core.step.optimizer import Training

_DISTRIBUTIONS = (
    "loongforge-core",
    "loongforge-models",
    "loongforge-data",
    "loongforge-ckpt",
    "megatron-core",
    "torch",
)


@dataclass(frozen=True, kw_only=True)
class _Pending:
    """A checkpoint that is being written behind the training."""

    plan: write.Plan
    background: write.Background
    manifest: Manifest


class Saver:
    """Saves training state below the run's directory. Collective: every rank calls every method.

    Every failure is a `CheckpointError` on all ranks, names the rank it happened on, and leaves earlier checkpoints
    alone. As a context manager it completes a background save at the end. `say` hears of every complete checkpoint.
    """

    def __init__(
        self, plan: Plan, world: World, fingerprint: Mapping[str, str], say: Callable[[str], object] = lambda text: None
    ) -> None:
        self.plan, self.world, self.fingerprint, self.say = plan, world, fingerprint, say
        section = plan.config.checkpoint
        self.directory = RunDirectory(Path(section.save)) if section.save else None
        self._pending: _Pending | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # All ranks raise a TrainingError together; any other error may be one rank's own, and the rest would wait.
        if error is None or isinstance(error, TrainingError):
            self.finish()

    def save(
        self, training: Training, step: int, consumed_samples: int, quarantine: Mapping[str, Any] | None = None
    ) -> None:
        """Save now, or start saving behind the training; a background save that still runs is completed first."""
        if self.directory is None:
            return
        self.finish()
        directory = self.directory
        self._together("prepare", lambda: directory.prepare(step) if self.world.is_main else None)
        optimizer = not self.plan.config.checkpoint.no_save_optim
        state = training_state(training, self.world, optimizer=optimizer)
        state["random"] = random_object(self.world)
        planned = write.plan_write(state, directory.draft(step))
        manifest = self._manifest(step, consumed_samples, optimizer, quarantine or {})
        if self.plan.config.checkpoint.async_save:
            background = self._together("start writing", lambda: write.Background(planned))
            self._pending = _Pending(plan=planned, background=background, manifest=manifest)
        else:
            self._complete(planned, self._together("write", planned.write), manifest)

    def poll(self) -> None:
        """Complete a background save if all ranks are done with it."""
        if self._pending and not any(self.world.gather(self._pending.background.running)):
            self.finish()

    def finish(self) -> None:
        """Wait for a background save and complete it."""
        if self._pending:
            pending, self._pending = self._pending, None
            self._complete(pending.plan, self._together("write", pending.background.result), pending.manifest)

    def _complete(self, planned: write.Plan, results: list[Any], manifest: Manifest) -> None:
        assert self.directory is not None
        directory, keep = self.directory, self.plan.config.checkpoint.keep_last
        everything = self._to_main(results)

        def finish() -> None:
            if self.world.is_main:
                planned.close(directory.draft(manifest.step), everything)
                directory.publish(manifest, keep)

        self._together("finish", finish)
        self.say(f"Checkpoint: {directory.path(manifest.step)}")

    def _to_main(self, results: list[Any]) -> list[list[Any]]:
        """Every rank's results on rank 0, nothing elsewhere."""
        if self.world.size == 1:
            return [results]
        gathered: list[Any] | None = [None] * self.world.size if self.world.is_main else None
        dist.gather_object(results, gathered, dst=0, group=self.world.control)
        return gathered or []

    def _together[T](self, what: str, action: Callable[[], T]) -> T:
        """Run an action on every rank, none of which waits for another in it; raise on all when it fails on one."""
        problems: list[str] = []
        answer: Any = None
        try:
            answer = action()
        except Exception as error:  # noqa: BLE001  torch and megatron-core wrap OSError in many classes; all of them mean: not saved
            problems.append(f"rank {self.world.rank}: {type(error).__name__}: {error}")
        if problems := self.world.agree(problems):
            assert self.directory is not None
            latest = None
            with suppress(CheckpointError):
                latest = self.directory.latest()
            kept = f"The latest complete checkpoint is {latest}." if latest else "No complete checkpoint exists yet."
            raise CheckpointError(
                f"cannot {what} a checkpoint below {self.directory.root}: {'; '.join(problems)}. {kept}"
            )
        return answer

    def _manifest(self, step: int, consumed_samples: int, optimizer: bool, quarantine: Mapping[str, Any]) -> Manifest:
        return Manifest(
            step=step,
            consumed_samples=consumed_samples,
            train_iters=self.plan.train_iters,
            layout=layout_facts(self.plan),
            precision=self.plan.config.train.precision,
            optimizer=optimizer,
            distributed_optimizer=self.plan.config.parallel.use_distributed_optimizer,
            fingerprint=dict(self.fingerprint),
            versions=_versions(),
            lora=lora_facts(self.plan),
            quarantine=quarantine,
        )


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
