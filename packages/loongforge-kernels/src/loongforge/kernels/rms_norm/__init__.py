"""`rms_norm(x, weight, eps=1e-6) -> y`: y = x / sqrt(mean(x^2 over the last dim) + eps) * weight.

x and y `[..., H]`, weight `[H]`, all of one floating dtype; beside a 16-bit x the weight may be fp32. Statistics and
products are fp32 (fp64 for fp64 input) and rounded once on the way out. Differentiable in x and weight.
"""

from loongforge.kernels.rms_norm.eager import rms_norm as rms_norm
