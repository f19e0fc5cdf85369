"""Open the run's data: choose the source, tell it all it may depend on, cut its samples into this rank's batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loongforge.core import plugins
from loongforge.core.checkpoint.start import Start
from loongforge.core.config.run import DataConfig
from loongforge.core.config.template_arguments import template_arguments
from loongforge.core.data.balance import Balancer, dealt
from loongforge.core.data.contract import Measured, SampleSource, SourceRequest, VisualProcessor
from loongforge.core.data.loader import Loader, LoaderShape, Settle
from loongforge.core.data.paths import without_weights
from loongforge.core.data.quarantine import Budget, Quarantine
from loongforge.core.data.source import source_of
from loongforge.core.errors import ConfigError, DataError
from loongforge.core.megatron.groups import World
from loongforge.core.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Data:
    """Training batches from a position on, and held-out batches from their beginning."""

    plan: Plan
    world: World
    train: SampleSource
    valid: SampleSource | None
    quarantine: Quarantine
    balancer: Balancer | None = None
    """Deals the samples of each training step; by position when None."""

    @contextmanager
    def loader(self, consumed_samples: int) -> Iterator[Loader]:
        """Micro-batches of this rank, beginning after `consumed_samples`."""
        shape = self._shape(consumed_samples, self.plan.config.data.num_workers)
        steps = None
        if self.balancer is not None:
            assert isinstance(self.train, Measured), "open_data has looked"
            steps = dealt(self.train, self.balancer, shape, self.plan.seq_length)
        with Loader(self.train, shape, steps, self._settle("train")) as loader:
            yield loader

    def held_out(self) -> Iterator[list[Any]]:
        """Micro-batches of this rank for each step of one evaluation; the same at every evaluation."""
        if self.valid is not None:
            with Loader(self.valid, self._shape(0, 0), settle=self._settle("valid")) as loader:
                for _ in range(self.plan.config.train.eval_iters):
                    yield loader.step()

    def fingerprint(self) -> Mapping[str, str]:
        """Facts that must not change for an exact resume."""
        train = self.plan.config.train
        return {
            **self.train.fingerprint(),
            "global_batch_size": str(self.plan.global_batch_size),
            "seq_length": str(train.seq_length),
            "training_phase": train.training_phase,
        }

    def _settle(self, part: str) -> Settle | None:
        return partial(self.quarantine.settle, part) if self.quarantine.budget else None

    def _shape(self, start: int, workers: int) -> LoaderShape:
        return LoaderShape(
            micro_batch_size=self.plan.config.train.micro_batch_size,
            num_microbatches=self.plan.num_microbatches,
            dp_rank=self.world.dp.rank(),
            dp_size=self.world.dp.size(),
            num_workers=workers,
            start_sample=start,
            position_rank=self.plan.geometry.position_rank,
            visual=self.plan.config.model.image_encoder is not None,
        )


def open_data(plan: Plan, world: World, start: Start) -> Data:
    """Open training data as far as this run will read, and held-out data when it evaluates. Every rank calls it."""
    train, section = plan.config.train, plan.config.data
    source = source_of(plan.config)
    needed = start.consumed_samples + max(0, plan.train_iters - start.step) * plan.global_batch_size
    opened = source.open()(request_of(plan, world, "train", section.data_path, needed))
    valid = None
    if train.eval_iters:
        if not section.valid_data_path and section.split is None and source.name != "mock":
            raise DataError(
                f"train.eval_iters={train.eval_iters} needs held-out data: give --valid-data-path FILE or "
                "--split 969,30,1, or set eval_iters to 0."
            )
        paths = section.valid_data_path or section.data_path
        valid = source.open()(request_of(plan, world, "valid", paths, train.eval_iters * plan.global_batch_size))
    quarantine = Quarantine(_budget(section), world, _quarantine_file(plan))
    if start.manifest is not None and not start.weights_only:
        quarantine.restore(start.manifest.quarantine)
    quarantine.begin([opened] if valid is None else [opened, valid])
    balancer = _balancer(plan, opened, source.name)
    return Data(plan=plan, world=world, train=opened, valid=valid, quarantine=quarantine, balancer=balancer)


def _budget(section: DataConfig) -> Budget:
    return Budget(samples=section.max_bad_samples, ratio=section.max_bad_ratio, run=section.max_bad_run)


def _quarantine_file(plan: Plan) -> Path | None:
    save = plan.config.checkpoint.save
    return Path(save) / "quarantine.jsonl" if save else None


def _balancer(plan: Plan, source: SampleSource, name: str) -> Balancer | None:
    """What `data.balance` names; `DataError` where the source does not know sizes."""
    chosen = plan.config.data.balance
    if chosen is None:
        return None
    if not isinstance(source, Measured):
        raise DataError(
            f"data.balance={chosen}: the source {name!r} does not know the sizes of its samples before it reads them; "
            "leave data.balance out, or give the source the methods of core.data.contract.Measured."
        )
    return plugins.load("balancers", chosen).open()(plan)


def request_of(plan: Plan, world: World, part: str, paths: tuple[str, ...], num_samples: int) -> SourceRequest:
    """What a source is told for `train` or `valid`; samples depend on nothing else."""
    section, train, tokenizer = plan.config.data, plan.config.train, plan.config.tokenizer
    separate = part != "train" and bool(section.valid_data_path)
    return SourceRequest(
        paths=paths,
        split=None if separate or (part == "train" and section.valid_data_path) else section.split,
        part=part,
        seq_length=train.seq_length,
        num_samples=num_samples,
        seed=train.seed,
        shuffle=section.shuffle and part == "train",
        packing=section.packing and train.training_phase == "sft",
        segment_multiple=segment_multiple(plan),
        vocab_size=plan.geometry.vocab_size,
        tokenizer_path=tokenizer_directory(plan),
        tokenizer_type=tokenizer.tokenizer_type,
        chat_template=tokenizer.chat_template,
        chat_template_kwargs=template_arguments(tokenizer.chat_template_kwargs),
        cache=cache_directory(plan, paths),
        text_field=section.text_field,
        messages_field=section.messages_field,
        data_format=section.data_format,
        train_on_prompt=section.train_on_prompt,
        history_mask_loss=section.history_mask_loss,
        overlong=section.overlong,
        loss_mask_eod=section.loss_mask_eod,
        is_builder=world.local_rank == 0,
        visual=visual_processor(plan),
        position_rank=plan.geometry.position_rank,
        pixels=getattr(world, "encodes", True),
        may_leave_out=section.max_bad_samples if _budget(section) else 0,
        verify_media=section.verify_media,
        barrier=world.barrier,
    )


def visual_processor(plan: Plan) -> VisualProcessor | None:
    """How the run prepares images and videos, its limits applied; None for a model without an encoder.

    `ConfigError` when model_type names no composition, which alone says how, or one that counts positions in another
    number of rows than the foundation.
    """
    model = plan.config.model
    if model.image_encoder is None:
        return None
    if model.model_type is None:
        raise ConfigError(
            "model.model_type: a model with an image encoder names its composition, which says how images are "
            f"prepared: one of {', '.join(plugins.registered('compositions')) or 'none installed'}."
        )
    composition: plugins.Composition = plugins.load("compositions", model.model_type)
    processor: VisualProcessor = composition.processor()(model).with_limits(plan.config.data)
    rows, wanted = len(processor.position_ids(1, [])), plan.geometry.position_rank
    if rows != wanted:
        raise ConfigError(
            f"model.model_type={model.model_type} counts positions in {rows} row(s), but model.foundation "
            f"({model.foundation.family}) takes {wanted}: choose a composition that writes as many, or a foundation "
            f"{'without' if wanted > 1 else 'with'} mrope_section."
        )
    return processor


def segment_multiple(plan: Plan) -> int:
    """What the length of a packed segment must divide by: context parallelism cuts each into 2 x cp chunks."""
    layout = plan.layout
    return math.lcm(2 * layout.cp if layout.cp > 1 else 1, layout.tp if layout.sp else 1)


def tokenizer_directory(plan: Plan) -> str | None:
    """Directory of the tokenizer: as given, or the directory the run was loaded from when it holds one."""
    given, load = plan.config.tokenizer.hf_tokenizer_path, plan.config.checkpoint.load
    if given:
        return given
    files = ("tokenizer.json", "qwen.tiktoken")
    return load if load and any((Path(load) / file).is_file() for file in files) else None


def cache_directory(plan: Plan, paths: tuple[str, ...]) -> Path:
    """Where what is derived from `paths` is kept: as given, or in the directory of the run, or beside the first."""
    section, save = plan.config.data, plan.config.checkpoint.save
    if section.data_cache_path:
        return Path(section.data_cache_path)
    if save:
        return Path(save) / "data_cache"
    files = without_weights(paths)
    return (Path(files[0]).parent if files else Path()) / ".loongforge_cache"
