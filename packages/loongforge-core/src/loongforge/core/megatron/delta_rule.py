"""The gated delta rule in torch: chunks of tokens as matrices, and the causal convolution in front of it.

For every value head a state `S` [D, V], zero before the first token, with decay `exp(g) <= 1` and step `beta`:

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T,    o_t = S_t^T q_t / sqrt(D)

(Yang et al., "Gated Delta Networks", 2024). Inside a chunk the corrections `u_t = beta_t (...)` depend on one another
through a unit lower triangular matrix, which is solved at once; the state steps from chunk to chunk.

Shapes: B rows, T tokens, K key heads, R value heads of each key head, D and V widths of a key's and a value's head,
C tokens of a chunk, N chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 64
"""Tokens whose corrections are solved at once."""
EPSILON = 1e-6
"""Under the root of a query's or key's length."""


@dataclass(frozen=True, kw_only=True)
class DeltaOps:
    """The two parts of a layer that have fast kernels."""

    convolve: Callable[..., torch.Tensor]
    """`convolve(x [B, T, C], weight [C, W], ends) -> [B, T, C]`: SiLU of the causal convolution of each channel."""
    rule: Callable[..., torch.Tensor]
    """`rule(q [B, T, K, D], k, v [B, T, K, R, V], decay [B, T, K, R] fp32, beta [B, T, K, R], ends) -> like v`;
    q and k are normalised inside."""
    line: str
    """What was chosen and why."""


def delta_ops(device_type: str, dtype: torch.dtype) -> DeltaOps:
    """flash-linear-attention's Triton kernels where there is a GPU and they are installed, else torch.

    Nothing of flash-linear-attention is imported on a CPU: its import asks Triton for a driver.
    """
    if device_type == "cpu":
        reason = "the device is a CPU"
    elif dtype == torch.float32:
        reason = "flash-linear-attention computes in 16 bits, the run in fp32"
    elif find_spec("fla") is None:
        reason = "flash-linear-attention is not installed (pip install flash-linear-attention)"
    else:
        return _fla_ops()
    return DeltaOps(convolve=convolve, rule=delta_rule, line=f"gated_delta_rule: {reason}; using torch")


def convolve(x: torch.Tensor, weight: torch.Tensor, ends: Sequence[int] | None = None) -> torch.Tensor:
    """SiLU of what each channel's last W tokens weigh, `[B, T, C]` to the same; `ends` are the ends of packed rows'
    segments from 0 on, which do not see each other."""
    if ends is not None and len(ends) > 2:
        return torch.cat([convolve(x[:, start:end], weight) for start, end in pairwise(ends)], dim=1)
    channels, width = weight.shape
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    return F.silu(F.conv1d(padded, weight.unsqueeze(1), groups=channels)).transpose(1, 2)


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    ends: Sequence[int] | None = None,
) -> torch.Tensor:
    """Outputs `[B, T, K, R, V]` in the type of `v`; arithmetic in fp32 or wider.

    q and k `[B, T, K, D]`, v `[B, T, K, R, V]`, decay (`g`, in log space, at most 0) and beta `[B, T, K, R]`. `ends`:
    ends of the segments of packed rows from 0 on; every segment begins with an empty state.
    """
    if ends is not None and len(ends) > 2:
        segments = [delta_rule(q[:, a:b], k[:, a:b], v[:, a:b], decay[:, a:b], beta[:, a:b]) for a, b in pairwise(ends)]
        return torch.cat(segments, dim=1)
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k = (_unit(t.to(wide)) for t in (q, k))
    queries = _chunks(q.unsqueeze(3) * q.size(-1) ** -0.5)  # [B, K, 1, N, C, D]
    keys, values = _chunks(k.unsqueeze(3)), _chunks(v.to(wide))  # [B, K, 1, N, C, D], [B, K, R, N, C, V]
    steps, past = _chunks(beta.to(wide).unsqueeze(-1)), _chunks(decay.to(wide).unsqueeze(-1)).cumsum(-2)
    # The decay from token s to token t of a chunk; what is not before t has none. [B, K, R, N, C, C]
    later = torch.ones(past.size(-2), past.size(-2), dtype=torch.bool, device=past.device).triu(1)
    between = (past - past.mT).masked_fill(later, -torch.inf).exp()
    system = steps * between * (keys @ keys.mT)
    both = torch.cat((steps * values, steps * past.exp() * keys), dim=-1)
    # Corrections with an empty state in front, and how much of a state each of them takes away; the diagonal is 1.
    solved = torch.linalg.solve_triangular(system, both, upper=False, unitriangular=True)
    corrections, taken = solved.split((values.size(-1), keys.size(-1)), dim=-1)
    outputs = _scan(corrections, taken, queries * past.exp(), between * (queries @ keys.mT),
                    keys * (past[..., -1:, :] - past).exp(), past[..., -1:, :].exp())  # fmt: skip
    # [N x (B, K, R, C, V)] to [B, T, K, R, V], without the tokens that filled the last chunk
    return torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4)[:, : v.size(1)].to(v.dtype)


def _scan(
    corrections: torch.Tensor,
    taken: torch.Tensor,
    queries: torch.Tensor,
    scores: torch.Tensor,
    keys: torch.Tensor,
    kept: torch.Tensor,
) -> list[torch.Tensor]:
    """Outputs `[B, K, R, C, V]` of each chunk; queries and keys carry their decay to the chunk's beginning or end,
    `kept` `[B, K, R, N, 1, 1]` is that of the whole chunk."""
    outputs: list[torch.Tensor] = []
    state = None
    for chunk in range(corrections.size(3)):
        parts = (corrections, taken, queries, scores, keys, kept)
        correction, take, query, score, key, keep = (part[:, :, :, chunk] for part in parts)
        if state is None:
            outputs.append(score @ correction)
            state = key.mT @ correction
        else:
            correction = correction - take @ state
            outputs.append(query @ state + score @ correction)
            state = keep * state + key.mT @ correction
    return outputs


def _unit(t: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1."""
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + EPSILON)


def _chunks(t: torch.Tensor) -> torch.Tensor:
    """`[B, T, K, R, X]` to `[B, K, R, N, C, X]`; zeros fill the last chunk: no decay, no key, no step."""
    size = min(CHUNK, t.size(1))
    t = F.pad(t, (0, 0, 0, 0, 0, 0, 0, -t.size(1) % size))
    return t.permute(0, 2, 3, 1, 4).unflatten(3, (-1, size))


def _fla_ops() -> DeltaOps:
    """flash-linear-attention's kernels behind the two signatures above."""
    import fla  # pyright: ignore[reportMissingImports]
    from fla.modules.convolution import causal_conv1d  # pyright: ignore[reportMissingImports]
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    def fast_convolve(x: torch.Tensor, weight: torch.Tensor, ends: Sequence[int] | None = None) -> torch.Tensor:
        return causal_conv1d(x=x, weight=weight, activation="silu", cu_seqlens=_ends(ends, x.device))[0]

    def fast_rule(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor,
                  ends: Sequence[int] | None = None) -> torch.Tensor:  # fmt: skip
        repeats = v.size(3)
        q, k = (t.repeat_interleave(repeats, dim=2) for t in (q, k))
        output: Any = chunk_gated_delta_rule(
            q, k, v.flatten(2, 3), g=decay.flatten(2), beta=beta.flatten(2), use_qk_l2norm_in_kernel=True,
            cu_seqlens=_ends(ends, q.device),
        )[0]  # fmt: skip
        return output.view_as(v)

    line = f"gated_delta_rule: using flash-linear-attention {fla.__version__}"
    return DeltaOps(convolve=fast_convolve, rule=fast_rule, line=line)


def _ends(ends: Sequence[int] | None, device: torch.device) -> torch.Tensor | None:
    return None if ends is None else torch.tensor(ends, dtype=torch.int64, device=device)
