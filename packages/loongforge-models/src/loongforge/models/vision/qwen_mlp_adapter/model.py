"""The Qwen projector: the merge x merge patches of a square side by side, then linear, GELU, linear.

Shapes: P patches, E encoder width, M = merge^2 patches of a square, H foundation width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule

from loongforge.core.errors import ConfigError
from loongforge.core.megatron.encoder_config import projector_config
from loongforge.models.vision.initial_weights import initialise
from loongforge.models.vision.qwen_mlp_adapter.config import QwenMlpAdapterConfig

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from loongforge.core.model.contract import TowerContext


class Merger(MegatronModule):
    """One level's norm and two-layer MLP, the first split by outputs and the second by inputs over tensor parallel."""

    def __init__(self, config: TransformerConfig, context: TowerContext, *, norm_after_merge: bool) -> None:
        super().__init__(config=config)
        layers, self.tp_group = context.layers, context.groups.tp
        width = config.ffn_hidden_size
        assert width is not None, "projector_config says it"
        self.width, self.norm_after_merge = width, norm_after_merge
        self.norm = layers.norm(
            config=config,
            hidden_size=width if norm_after_merge else context.encoder.hidden_size,
            eps=config.layernorm_epsilon,
        )
        self.mlp = MLP(
            config,
            MLPSubmodules(linear_fc1=layers.column_linear, linear_fc2=layers.row_linear, activation_func=None),
            input_size=width,
            ffn_hidden_size=width,
            tp_group=self.tp_group,
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[P, E]` to `[P / M, H]`."""
        squares = hidden.numel() // self.width
        if self.norm_after_merge:
            hidden = self.norm(hidden.reshape(squares, self.width))
        else:
            hidden = self.norm(hidden).reshape(squares, self.width)
        # megatron-core's matrices take [S, B, H].
        output, bias = self.mlp(hidden.unsqueeze(1))
        return (output if bias is None else output + bias).squeeze(1)


class MlpAdapter(MegatronModule):
    """One merger for the encoder's last layer and one for each deepstack level; a `Projector` of the contract."""

    def __init__(self, config: QwenMlpAdapterConfig, context: TowerContext) -> None:
        geometry = config.geometry()
        megatron = projector_config(geometry, context)
        super().__init__(config=megatron)
        self.tp_group = context.groups.tp
        self.merger = Merger(megatron, context, norm_after_merge=False)
        self.deepstack_mergers = torch.nn.ModuleList(
            Merger(megatron, context, norm_after_merge=geometry.deepstack_norm_after_merge)
            for _ in range(context.encoder.levels)
        )
        if context.initialise:
            seed = context.run.train.seed
            initialise(self, std=geometry.init_method_std, seed=seed, tp=context.groups.tp)

    def forward(self, hidden: list[torch.Tensor], grid: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """Each `[P, E]` to `[P / M, 1 + levels, H]`; squares are neighbours already, so `grid` changes nothing."""
        mergers = [self.merger, *self.deepstack_mergers]
        return torch.stack([merger(level) for merger, level in zip(mergers, hidden, strict=True)], 1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """megatron-core's, merger by merger: it takes what lies in a plain list of modules for copies."""
        found = self.merger.sharded_state_dict(f"{prefix}merger.", sharded_offsets, metadata)
        for level, merger in enumerate(self.deepstack_mergers):
            assert isinstance(merger, Merger), "made above"
            found |= merger.sharded_state_dict(f"{prefix}deepstack_mergers.{level}.", sharded_offsets, metadata)
        return found


def build(config: QwenMlpAdapterConfig, context: TowerContext) -> MlpAdapter:
    """The projector on this rank; `ConfigError` when a stated size is not the encoder's or the foundation's."""
    stated = (
        ("input_size", config.input_size, "image_encoder", context.encoder.hidden_size),
        ("output_size", config.output_size, "foundation", context.output_size),
    )
    problems = [
        f"model.image_projector.{name}={size}: model.{owner}.hidden_size is {other}. Leave {name} unset to follow it."
        for name, size, owner, other in stated
        if size not in (None, other)
    ]
    if problems:
        raise ConfigError(*problems)
    return MlpAdapter(config, context)
