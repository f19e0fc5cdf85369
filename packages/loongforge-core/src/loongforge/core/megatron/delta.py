"""A layer with the gated delta rule in place of attention (Yang et al., "Gated Delta Networks", 2024).

megatron-core's `GatedDeltaNet` needs flash-linear-attention to be built, refuses packed rows without its kernels and
normalises the output with the model's norm. This module has its parameter names and another order of rows: those of
`in_proj` and `conv1d` stand key head by key head, as `linear_qkv` has them group by group, so that tensor parallel
ranks split whole tensors and checkpoints move between tensor parallel sizes like any other.

Shapes: S tokens of a sequence on this rank, B batch, T tokens of a row over all context parallel ranks, K key heads of
this rank, R value heads of each, D and V widths of a key's and a value's head.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default

from loongforge.core.megatron.layers import PackedRow, model_parallel_random
from loongforge.core.megatron.ops import kernels
from loongforge.core.model.geometry import DeltaGeometry

if TYPE_CHECKING:
    from loongforge.core.megatron.specs import Layers


@dataclass(frozen=True, kw_only=True)
class DeltaOps:
    """What the layers call; signatures as documented in `loongforge.kernels`."""

    convolution: Callable[..., torch.Tensor]
    rule: Callable[..., torch.Tensor]
    lines: tuple[str, ...]
    """What was chosen and why."""


def delta_ops(device_type: str, dtype: torch.dtype) -> DeltaOps:
    """The best implementations for the device."""
    registry = kernels()
    convolution = registry.choose("causal_convolution", device_type, dtype)
    rule = registry.choose("gated_delta_rule", device_type, dtype)
    return DeltaOps(convolution=convolution.call, rule=rule.call, lines=(convolution.line(), rule.line()))


class Convolution(torch.nn.Module):
    """The weights of the causal convolution, `[channels, 1, kernel]` as `torch.nn.Conv1d` has them."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class GatedDelta(MegatronModule):
    """Projections, short convolution, gated delta rule, norm of each head, output gate, output projection."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        delta: DeltaGeometry,
        layers: Layers,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "GatedDelta takes its groups explicitly"
        self.layer_number, self.tp_group, self.ops = layer_number, pg_collection.tp, layers.delta()
        size = self.tp_group.size()
        assert size == 1 or config.sequence_parallel, (
            "the gated delta rule on several tensor parallel ranks needs sequence parallelism; the plan says so"
        )
        assert pg_collection.cp.size() == 1, "the gated delta rule does not split sequences; the plan says so"
        self.heads = delta.num_key_heads // size
        self.repeats = delta.num_value_heads // delta.num_key_heads
        self.key_dim, self.value_dim = delta.key_head_dim, delta.value_head_dim
        widths = self._widths()
        self.in_proj = layers.column_linear(
            config.hidden_size, delta.num_key_heads * sum(widths), config=config, init_method=config.init_method,
            gather_output=False, bias=False, skip_bias_add=False, is_expert=False, tp_group=self.tp_group,
        )  # fmt: skip
        values = self.heads * self.repeats
        self.conv1d = Convolution(self._split(self.heads * widths[0], 1, delta.conv_kernel))
        self.dt_bias, self.A_log = self._split(values), self._split(values)
        plain = copy(config)
        plain.layernorm_zero_centered_gamma = False
        self.out_norm = layers.norm(config=plain, hidden_size=self.value_dim, eps=config.layernorm_epsilon)
        self.out_proj = layers.row_linear(
            delta.num_value_heads * self.value_dim, config.hidden_size, config=config,
            init_method=config.output_layer_init_method, bias=False, input_is_parallel=True, skip_bias_add=True,
            is_expert=False, tp_group=self.tp_group,
        )  # fmt: skip
        if config.perform_initialization:
            self._initialise()
        self.recomputes = config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules

    def _widths(self) -> tuple[int, int, int, int]:
        """Channels of a key head: query, key and values together; output gate; steps; decays."""
        values = self.repeats * self.value_dim
        return 2 * self.key_dim + values, values, self.repeats, self.repeats

    def _split(self, *shape: int) -> torch.nn.Parameter:
        """This rank's part of a parameter whose first dimension tensor parallel ranks share."""
        made = torch.nn.Parameter(
            torch.empty(shape, dtype=self.config.params_dtype, device=torch.cuda.current_device())
        )
        tensor_parallel.set_tensor_model_parallel_attributes(made, True, 0, 1)
        return made

    @torch.no_grad()
    def _initialise(self) -> None:
        """Decay rates uniform between 1 and 16, as the reference has them; steps of time begin at softplus(1)."""
        with model_parallel_random():
            initialise: Any = self.config.init_method  # upstream annotates as optional what it fills in
            initialise(self.conv1d.weight)
            self.A_log.uniform_(1, 16).log_()
        self.dt_bias.fill_(1)

    def forward(
        self, hidden: torch.Tensor, attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedRow | None = None, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """`[S, B, H]` to the same, and no bias. Positions take no part: the rule knows the order of tokens itself."""
        assert attention_mask is None, "the gated delta rule is causal; other masks are not supported"
        ends = None if packed_seq_params is None else packed_seq_params.boundaries
        projected = self.in_proj(hidden)[0].transpose(0, 1)  # [B, T, K x widths]
        heads = projected.unflatten(-1, (self.heads, -1))
        mixed, gate, steps, decays = heads.split(self._widths(), dim=-1)

        def attend(mixed: torch.Tensor, steps: torch.Tensor, decays: torch.Tensor) -> torch.Tensor:
            return self._attend(mixed, steps, decays, ends)

        if self.recomputes and torch.is_grad_enabled():
            output = tensor_parallel.checkpoint(attend, False, mixed, steps, decays)
        else:
            output = attend(mixed, steps, decays)
        gate = gate.unflatten(-1, (self.repeats, self.value_dim))
        output = (self.out_norm(output) * F.silu(gate.float())).to(hidden.dtype)
        return self.out_proj(output.flatten(2).transpose(0, 1).contiguous())[0], None

    def _attend(
        self, mixed: torch.Tensor, steps: torch.Tensor, decays: torch.Tensor, ends: tuple[int, ...] | None
    ) -> torch.Tensor:
        """Convolution and rule: `[B, T, K, 2 D + R V]`, `[B, T, K, R]` twice, to `[B, T, K, R, V]`."""
        ops: DeltaOps = self.ops
        convolved = ops.convolution(mixed.flatten(2), self.conv1d.weight.squeeze(1), ends)
        widths = (self.key_dim, self.key_dim, self.repeats * self.value_dim)
        query, key, values = convolved.unflatten(2, (self.heads, -1)).split(widths, dim=-1)
        # fp32: in 16 bits a rate near 0 or 1 loses what tells long memories apart.
        rate, bias = (one.float().view(self.heads, -1) for one in (self.A_log, self.dt_bias))  # [K, R]
        decay = -rate.exp() * F.softplus(decays.float() + bias)
        values = values.unflatten(-1, (self.repeats, self.value_dim))
        return ops.rule(query, key, values, decay, steps.sigmoid(), ends)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Every tensor with the ranks that share it, for megatron-core's checkpoints."""
        assert metadata is not None, "saving names the groups"
        own = {name: getattr(self, name) for name in ("A_log", "dt_bias")} | {"conv1d.weight": self.conv1d.weight}
        state = make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
        for name in ("in_proj", "out_norm", "out_proj"):
            offsets: Any = sharded_offsets  # upstream annotates one offset and takes any number
            state |= sharded_state_dict_default(
                getattr(self, name), f"{prefix}{name}.", offsets, metadata, tp_group=self.tp_group
            )
        return state


def delta_spec(layers: Layers, delta: DeltaGeometry) -> ModuleSpec:
    """The gated delta rule out of the platform's layers."""
    return ModuleSpec(module=GatedDelta, params={"delta": delta, "layers": layers})
