"""`rope(x, cos, sin, interleaved=False) -> y`: turn pairs of columns by position-dependent angles.

x and y `[S, B, heads, D]` (or anything cos and sin broadcast to). cos and sin `[S, 1 or B, 1, R/2]` hold one value for
each pair; R <= D, and the last D - R columns pass through. Pair i is columns (i, i + R/2), or (2i, 2i + 1) when
`interleaved`. Arithmetic is in the wider of the types of x and cos, the result has the type of x. Differentiable in x.
"""

from loongforge.kernels.rope.eager import rope as rope
