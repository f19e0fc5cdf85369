"""`linear_cross_entropy(hidden, weight, labels, ...) -> loss`: cross entropy of hidden @ weight.T, logits never whole.

hidden `[..., H]`, weight `[V, H]` of one dtype, labels `[...]` int64, loss `[...]` fp32 (fp64 for fp64 input), 0 with
zero gradient where the label is `ignore_index`.

`token_weight` `[...]`, for example the loss mask, says how the losses will be weighted afterwards. It does not change
the result: it lets the forward pass compute the gradients at once, so that logits are computed once and not twice. A
backward that arrives with other weights, or a second one, computes them again and is right too. Differentiable in
hidden and weight.
"""

from loongforge.kernels.linear_cross_entropy.eager import linear_cross_entropy as linear_cross_entropy
