"""`causal_attention(query, key, value, scale) -> output`: softmax(query key^T * scale) value without the future.

query and output `[B, H, S, D]`, key and value `[B, G, C, D]` of one floating dtype, H a multiple of G: query heads
`g * H / G` onwards share key head g. C is at least S, and the last query sees all keys: query i sees keys 0 to
C - S + i. Any strides. Differentiable in query, key and value.
"""

from loongforge.kernels.causal_attention.eager import causal_attention as causal_attention
