"""The gated delta rule in torch: chunks of tokens as matrices. The truth that fast paths are compared with.

Inside a chunk the corrections `u_t = beta_t (...)` depend on one another through a unit lower triangular matrix, which
is solved at once; the state steps from chunk to chunk.

Shapes: as in the package, with C tokens of a chunk and N chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

CHUNK = 64
"""Tokens whose corrections are solved at once."""
EPSILON = 1e-6
"""Under the root of a query's or key's length."""


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    ends: Sequence[int] | None = None,
) -> torch.Tensor:
    """o `[B, T, K, R, V]`; see the package. Arithmetic in fp32 or wider."""
    if ends is not None and len(ends) > 2:
        segments = [
            gated_delta_rule(q[:, a:b], k[:, a:b], v[:, a:b], decay[:, a:b], beta[:, a:b]) for a, b in pairwise(ends)
        ]
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
