"""`packed_attention(query, key, value, parts, scale, causal=True) -> output`: attention inside each part of a row.

query and output `[T, H, D]`, key and value `[C, G, D]` of one floating dtype, H a multiple of G: query heads
`g * H / G` onwards share key head g. `parts` says how many rows of query and of key each part has, in order. The last
query of a part sees all its keys, the one before it all but one, and so on: a part with more keys than queries is the
end of a longer sequence. Without `causal` every query of a part sees all its keys. Any strides. Differentiable in
query, key and value.
"""

from loongforge.kernels.packed_attention.parts import Parts as Parts
