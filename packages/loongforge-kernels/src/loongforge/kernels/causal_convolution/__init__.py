"""`causal_convolution(x, weight, ends=None) -> y`: y_t = silu(sum over w of weight[:, w] * x_{t - W + 1 + w}).

x and y `[B, T, C]`, weight `[C, W]` of one floating dtype: each channel weighs its last W tokens, with zeros before the
first. `ends` are the ends of a packed row's segments from 0 on, as `(0, 3, 70)`, which do not see each other; B is
then 1. Differentiable in x and weight.
"""

from loongforge.kernels.causal_convolution.reference import causal_convolution as causal_convolution
