"""`row_bounds(ends, rows=None, *, causal=True) -> (ks, ke)`: which keys each query may see.

`ends` are the documents' ends in the packed row of keys, integer `[N + 1]` and ascending from 0 (`cu_seqlens`); `rows`
says which key row each query is, integer `[T]`, every key row in order when None. Query t sees keys `ks[t]` up to and
without `ke[t]`, both int32 `[T]`: its document's from the start to itself, or to the end when not causal. A row outside
`[0, ends[-1])` sees nothing: both are 0. Kernels know packing, context parallel and padding through these alone.

`zigzag_rows(ends, rank, size) -> rows`: the rows int64 `[ends[-1] / size]` of a context parallel rank in the order it
holds them. Every document is cut into `2 * size` chunks, and rank r holds chunks r and `2 * size - 1 - r` of each.
"""

from loongforge.kernels.row_bounds.reference import row_bounds as row_bounds
from loongforge.kernels.row_bounds.reference import zigzag_rows as zigzag_rows
