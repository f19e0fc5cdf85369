"""`swiglu(x) -> y`: y = silu(gate) * up, where x `[..., 2F]` holds gate in its first and up in its last F columns.

y `[..., F]`, dtype of x. Differentiable.
"""

from loongforge.kernels.swiglu.eager import swiglu as swiglu
