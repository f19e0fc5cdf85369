"""Our own layers where megatron-core has none without TransformerEngine: norm and core attention.

Shapes: S sequence (this rank's part), B batch, N heads of this tensor parallel rank, D head width, H hidden. Megatron's
order is `[S, B, H]`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from loongforge.core.megatron.row_parts import RowParts, Sight
from loongforge.core.platform.sending import sent
from loongforge.kernels.packed_attention import sdpa

RmsNorm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def torch_rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's RMSNorm with the signature of `loongforge.kernels.rms_norm`."""
    return F.rms_norm(hidden, weight.shape, weight, eps)


class GatedActivation(torch.nn.Module):
    """SwiGLU as megatron-core's MLP takes an activation module: gate and up halves in, one half out."""

    def __init__(self, config: Any, swiglu: Callable[[torch.Tensor], torch.Tensor], **_: Any) -> None:
        super().__init__()
        assert config.gated_linear_unit, "only gated MLPs are built"
        assert config.activation_func is F.silu, "only SwiGLU is built"
        self.swiglu = swiglu

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., 2 F]` to `[..., F]`."""
        return self.swiglu(hidden)


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm over the last dimension, with the marks sequence parallelism needs.

    Stands in for `WrappedTorchNorm`, which refuses sequence parallelism and zero-centred weights.
    """

    def __init__(
        self, config: Any, hidden_size: int, eps: float = 1e-5, rms_norm: RmsNorm = torch_rms_norm, **_: Any
    ) -> None:
        super().__init__()
        self.rms_norm = rms_norm
        self.eps, self.shape = eps, (hidden_size,)
        self.rms = config.normalization == "RMSNorm"
        self.zero_centered = config.layernorm_zero_centered_gamma

        def parameter(value: float) -> torch.nn.Parameter:
            made = torch.nn.Parameter(
                torch.full(self.shape, value, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            # Tells megatron-core to sum its gradient over tensor parallel ranks.
            made.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]
            return made

        self.weight = parameter(0.0 if self.zero_centered else 1.0)
        self.bias = None if self.rms else parameter(0.0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., hidden_size]` to the same shape."""
        weight = self.weight
        if self.zero_centered:
            # fp32 beside a 16-bit input, which the kernels take: near 1 such a type has no room for a small weight.
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + 1
        if self.rms:
            return self.rms_norm(hidden, weight, self.eps)
        return F.layer_norm(hidden, self.shape, weight, self.bias, self.eps)


class RowLinear(RowParallelLinear):
    """megatron-core's; it leaves its group out of the call below and then warns at every forward pass."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super()._forward_impl(input, weight, *args, **{**kwargs, "tp_group": self.tp_group})


def model_parallel_random() -> AbstractContextManager[None]:
    """Random numbers that differ between tensor parallel ranks, inside the block."""
    tracker = tensor_parallel.get_cuda_rng_tracker()
    assert tracker is not None, "build_model seeds the tracker"
    return tracker.fork()


@dataclass
class PackedRow(PackedSeqParams):
    """megatron-core's description of a packed row, with its boundaries on the host: no layer waits for the device."""

    boundaries: tuple[int, ...] = ()
    shared: dict[tuple[int, int], RowParts] = field(default_factory=dict)
    """The parts as a context parallel rank (rank, size) has them, made by the first layer that asks."""
    sights: dict[tuple[int, int], Sight] = field(default_factory=dict)
    """The same for what layers with chosen keys ask for."""

    @classmethod
    def of(cls, boundaries: tuple[int, ...], device: torch.device) -> PackedRow:
        """A row whose segments end at `boundaries` (global, before context parallel splitting)."""
        ends = sent(torch.tensor(boundaries, dtype=torch.int32), device)
        longest = max(end - start for start, end in pairwise(boundaries))
        return cls(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest,
            boundaries=boundaries,
        )  # fmt: skip

    def parts(self, rank: int, size: int, device: torch.device) -> RowParts:
        """What the queries of one context parallel rank see."""
        if (rank, size) not in self.shared:
            self.shared[rank, size] = RowParts.of(self.boundaries, rank, size, device)
        return self.shared[rank, size]

    def sight(self, rank: int, size: int, device: torch.device) -> Sight:
        """The keys that each token of a context parallel rank may see."""
        if (rank, size) not in self.sights:
            self.sights[rank, size] = Sight.of(self.boundaries, rank, size, device)
        return self.sights[rank, size]


class SDPAttention(MegatronModule):
    """Core attention through `torch.nn.functional.scaled_dot_product_attention`, or the kernels handed over.

    `causal_attention` stands in where whole sequences see nothing but the causal mask, `packed_attention` is for packed
    rows and context parallelism; their signatures are those of the ops of `loongforge.kernels`.

    Grouped queries, padded or packed rows, and context parallelism by gathering keys and values (the forward gather's
    backward is a reduce-scatter).
    """

    def __init__(self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str,
                 attention_dropout: float | None = None, softmax_scale: float | None = None,
                 cp_comm_type: str | None = None, pg_collection: Any = None,
                 causal_attention: Callable[..., torch.Tensor] | None = None,
                 packed_attention: Callable[..., torch.Tensor] = sdpa.packed_attention, **_: Any) -> None:  # fmt: skip
        super().__init__(config=config)
        self.causal_attention, self.packed_attention = causal_attention, packed_attention
        assert pg_collection is not None, "SDPAttention takes its groups explicitly"
        self.attn_mask_type, self.scale, self.cp = attn_mask_type, softmax_scale, pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self._whole: PackedRow | None = None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
                attn_mask_type: AttnMaskType | None = None, attention_bias: torch.Tensor | None = None,
                packed_seq_params: PackedSeqParams | None = None, **_: Any) -> torch.Tensor:  # fmt: skip
        """`query [S, B, N, D]`, `key` `[S, B, groups, D]`, `value` `[S, B, groups, V]` to `[S, B, N * V]`.

        Packed rows have no B on the way in.
        """
        assert attention_bias is None, "attention bias is not supported"
        causal = (attn_mask_type or self.attn_mask_type) in (AttnMaskType.causal, AttnMaskType.padding_causal)
        assert causal, "only causal attention is supported"
        width = value.size(-1)
        # Kernels know one width. Zeros add nothing to scores, and what they add to the output is cut off.
        scale = query.size(-1) ** -0.5 if self.scale is None else self.scale
        query, key, value = (_widen(t, max(query.size(-1), width)) for t in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        # Heads differ between tensor parallel ranks, so their dropout must too.
        separate = dropout > 0 and not self.config.sequence_parallel
        with model_parallel_random() if separate else nullcontext():
            if packed_seq_params is not None:
                assert isinstance(packed_seq_params, PackedRow), "packed rows come as PackedRow"
                query, key, value = (t.flatten(0, 1) if t.dim() == 4 else t for t in (query, key, value))
                output = self._packed(query, key, value, packed_seq_params, scale, dropout).unsqueeze(1)
            elif self.cp.size() > 1:  # the sequences of a batch are the segments of a row
                row, batch = self._row_of(query), query.size(1)
                query, key, value = (t.transpose(0, 1).flatten(0, 1) for t in (query, key, value))
                output = self._packed(query, key, value, row, scale, dropout).unflatten(0, (batch, -1)).transpose(0, 1)
            else:
                output = self._attend(query, key, value, scale, dropout)
        return output[..., :width].flatten(2)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow, scale: float,
                dropout: float) -> torch.Tensor:  # fmt: skip
        """`[T, N, D]` and twice `[T, groups, D]` to `[T, N, D]`."""
        parts = row.parts(self.cp.rank(), self.cp.size(), query.device)
        if self.cp.size() > 1:
            key, value = (gather_from_sequence_parallel_region(t, group=self.cp) for t in (key, value))
        # Dropout is torch's own alone.
        attend = partial(sdpa.packed_attention, dropout=dropout) if dropout > 0 else self.packed_attention
        query = query if parts.order is None else query.index_select(0, parts.order)
        outputs: list[torch.Tensor] = []
        for some, turn in zip(query.chunk(len(parts.turns)), parts.turns, strict=True):
            keys, values = (t if turn.keys is None else t.index_select(0, turn.keys) for t in (key, value))
            outputs.append(attend(some, keys, values, turn.parts, scale))
        output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return output if parts.back is None else output.index_select(0, parts.back)

    def _row_of(self, query: torch.Tensor) -> PackedRow:
        """A batch of whole sequences `[S, B, N, D]`, one after the other; kept, for it rarely changes."""
        length, batch = query.size(0) * self.cp.size(), query.size(1)
        boundaries = tuple(range(0, length * batch + 1, length))
        if self._whole is None or self._whole.boundaries != boundaries:
            self._whole = PackedRow.of(boundaries, query.device)
        return self._whole

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
                dropout: float) -> torch.Tensor:  # fmt: skip
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if self.causal_attention is not None and dropout == 0:
            return self.causal_attention(query, key, value, scale).permute(2, 0, 1, 3)
        output = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=key.size(1) != query.size(1)
        )
        return output.permute(2, 0, 1, 3)


def _widen(tensor: torch.Tensor, width: int) -> torch.Tensor:
    return tensor if tensor.size(-1) == width else F.pad(tensor, (0, width - tensor.size(-1)))
