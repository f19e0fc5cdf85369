"""The encoder on ranks of its own: its features cross megatron-core's bridge, one micro-batch after the other.

Encoder and foundation are two modules of one pipeline. The schedule, the bridge between the two grids and the order of
everything on it are megatron-core's; here each side says what it computes and what it hands on. Both sides read the
same samples: copy i of the encoder serves replica i of the foundation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from loongforge.core.exchange.route import Grid
from loongforge.core.megatron.groups import World
from loongforge.core.megatron.transformer_config import compute_type
from loongforge.core.model.contract import Visual
from loongforge.core.model.omni import Tower
from loongforge.core.plan import Plan
from loongforge.core.platform.sending import sent
from loongforge.core.step.visual import scene_of

if TYPE_CHECKING:
    from loongforge.core.step.optimizer import Training

Batch = Mapping[str, Any]
Numbered = tuple[int, Batch]
Step = Callable[[Iterator[Numbered], Any], tuple[Any, Any]]
"""The schedule's callback: micro-batches and a model to an output and the function that makes its loss."""

ENCODER, FOUNDATION = "encoder", "foundation"


class Apart:
    """One rank's side: what the schedule takes for its model, and where the foundation's features come from."""

    def __init__(self, plan: Plan, world: World, module: Any) -> None:
        """`module` is the tower or the foundation's only chunk, wrapped. Collective over all ranks."""
        from megatron.core.pipeline_parallel.multimodule_communicator import MultiModulePipelineCommunicator
        from megatron.core.process_groups_config import MultiModuleProcessGroupCollection

        assert world.shores is not None, "the encoder has ranks of its own"
        self.module, self.config = module, module.config
        self._plan, self._world = plan, world
        # A step's micro-batches have unequal numbers of features, so shapes travel with them.
        self.config.variable_seq_lengths = True
        self.config.pipeline_dtype = compute_type(plan.config.train)
        name = FOUNDATION if world.holds_foundation else ENCODER
        self._groups = MultiModuleProcessGroupCollection(
            {name: world.groups}, language_model_module_name=FOUNDATION if world.holds_foundation else None
        )
        axes: Any = {"s": 0, "b": 1, "h": 2}
        self._communicator: Any = MultiModulePipelineCommunicator(
            {ENCODER: world.shores.encoder, FOUNDATION: world.shores.foundation},
            {ENCODER: [FOUNDATION], FOUNDATION: []},
            self.config,
            dim_mapping=axes,
            module_output_ndim={ENCODER: 2, FOUNDATION: 3},
        )
        self._batches: Sequence[Batch] = ()
        self._received: torch.Tensor | None = None

    def start(self, micro_batches: Sequence[Batch]) -> None:
        """Remember the step's micro-batches."""
        self._batches = micro_batches

    def finish(self) -> None:
        """The backward passes have done everything."""
        self._batches, self._received = (), None

    def set_input_tensor(self, tensors: list[dict[str, Any]]) -> None:
        """What came from the encoder or from the stage before; called by the pipeline schedule."""
        from megatron.core.utils import get_attr_wrapped_model

        (incoming,) = tensors
        if ENCODER in incoming:
            self._received = incoming[ENCODER]
        elif FOUNDATION in incoming:
            get_attr_wrapped_model(self.module, "set_input_tensor")(incoming[FOUNDATION])

    def run(self, step: Step, micro_batches: Sequence[Batch], *, forward_only: bool) -> list[torch.Tensor]:
        """The pipeline over both sides; what the foundation's `step` measured, on its last stage. Collective."""
        from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_without_interleaving

        with warnings.catch_warnings():
            # The bridge broadcasts what it received, and the schedule itself hands that tensor's gradient back.
            warnings.filterwarnings("ignore", "c10d::broadcast_: an autograd kernel was not registered", UserWarning)
            return forward_backward_pipelining_without_interleaving(
                forward_step_func=self._on_foundation(step) if self._world.holds_foundation else self._on_encoder,
                data_iterator=iter(list(enumerate(micro_batches))),
                model=self,  # pyright: ignore[reportArgumentType]  it needs a configuration and set_input_tensor alone
                num_microbatches=len(micro_batches),
                seq_length=micro_batches[0]["tokens"].size(1),
                micro_batch_size=micro_batches[0]["tokens"].size(0),
                forward_only=forward_only,
                p2p_communicator=self._communicator,
                pg_collection=self._groups,
            )

    def _on_foundation(self, step: Step) -> Step:
        def forward(batches: Iterator[Numbered], _: Any) -> tuple[Any, Any]:
            output, loss = step(batches, self.module)
            return (output if self._world.is_last_stage else {FOUNDATION: output}), loss

        return forward

    def _on_encoder(self, batches: Iterator[Numbered], _: Any) -> tuple[dict[str, torch.Tensor], None]:
        """Features `[n, (1 + levels) * H]` of one micro-batch; n is 1 without an image, for the bridge needs a row."""
        _, batch = next(batches)
        tower, pixels = _tower(self.module), batch.get("pixels")
        grids: Sequence[Grid] = scene_of(batch, tower.geometry).grids
        if pixels is None:
            assert not grids, "a micro-batch with items has patches"
            pixels, grids = tower.nothing(self._world.device)
        else:
            pixels = sent(pixels, self._world.device)
        rows = self.module(pixels, grids)
        return {ENCODER: rows.flatten(1).to(self.config.pipeline_dtype).contiguous()}, None

    def visual(self, number: int) -> Visual | None:
        """What the encoder sent for this micro-batch, on ranks of the foundation's first stage.

        The bridge brings the same rows to all tensor parallel ranks and takes back the gradient of one of them, so each
        must know the whole gradient. Where they hold parts of the sequence it is the sum of theirs; elsewhere hidden
        states, and so the gradients, are equal on all of them.
        """
        from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

        assert self._received is not None, "the bridge always brings a row"
        geometry, tp = self._plan.encoder_geometry, self._world.tp
        assert geometry is not None, "there is an encoder"
        scene = scene_of(self._batches[number], geometry)
        rows = self._received.unflatten(1, (1 + geometry.levels, -1))
        sample, place = (torch.from_numpy(part) for part in divmod(scene.positions, scene.length))
        places, order = (place * scene.rows + sample).sort()  # of hidden states [S, B]
        if self._plan.layout.sp:
            rows = copy_to_tensor_model_parallel_region(rows, group=tp)
            share = scene.rows * scene.length // tp.size()
            here = places // share == tp.rank()
            places, order = places[here] - share * tp.rank(), order[here]
        return Visual(rows=rows[sent(order, rows.device)], positions=sent(places, rows.device))


def finish_gradients(
    models: list[Any],
    num_tokens: torch.Tensor | None = None,
    *,
    world: World,
    training: Training,
    pg_collection: Any = None,
    force_all_reduce: bool | None = False,
) -> None:
    """megatron-core's last work on gradients, each side over its own copies.

    Both sides divide by the unmasked tokens of the whole batch, which the foundation counts and tells the encoder.
    """
    from megatron.core.distributed import finalize_model_grads

    assert num_tokens is not None, "gradients are sums over tokens"
    assert world.shores is not None, "the encoder has ranks of its own"
    own = None if training.tower is not None else num_tokens
    finalize_model_grads(training.wrapped, own, pg_collection=world.groups, force_all_reduce=force_all_reduce)
    training.feed.finish()
    dist.broadcast(num_tokens, src=world.shores.foundation.rank_offset)
    if training.tower is not None:
        training.tower.scale_gradients(1.0 / torch.clamp(num_tokens, min=1))


def _tower(module: Any) -> Tower:
    while not isinstance(module, Tower):
        module = module.module
    return module
