"""`gated_delta_rule(q, k, v, decay, beta, ends=None) -> o`: linear attention whose state forgets and corrects itself.

For every value head a state `S` [D, V], zero before the first token, with decay `exp(g) <= 1` and step `beta`:

    S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T,    o_t = S_t^T q_t / sqrt(D)

(Yang et al., "Gated Delta Networks", 2024), where every q_t and k_t is first made `x / sqrt(|x|^2 + 1e-6)`.

q and k `[B, T, K, D]`, v and o `[B, T, K, R, V]` of one floating dtype, decay (`g`, in log space, at most 0)
`[B, T, K, R]` fp32 or wider, beta `[B, T, K, R]`: B rows, T tokens, K key heads, R value heads of each key head, D and
V widths of a key's and a value's head. `ends` are the ends of a packed row's segments from 0 on, as `(0, 3, 70)`; every
segment begins with an empty state, and B is then 1. Differentiable in all tensors.
"""

from loongforge.kernels.gated_delta_rule.reference import gated_delta_rule as gated_delta_rule
