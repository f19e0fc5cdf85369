"""`linear_cross_entropy(hidden, weight, labels, ...) -> loss`: cross entropy of hidden @ weight.T, logits never whole.

hidden `[..., H]`, weight `[V, H]` of one dtype, labels `[...]` int64, loss `[...]` fp32 (fp64 for fp64 input), 0 with
zero gradient where the label is `ignore_index`.

`token_weight` `[...]`, for example the loss mask, says how the losses will be weighted afterwards. It does not change
the result: it lets the forward pass compute the gradients at once, so that logits are computed once and not twice. A
backward that arrives with other weights, or a second one, computes them again and is right too; to find that out it
waits for the device. With `proportional` the caller promises that the losses' gradient will be `token_weight` (or 1
for every token) times one number: then nothing waits, and a promise that is not kept makes every gradient NaN.
Differentiable in hidden and weight.

Vocabulary parallel: with `tp_group` each of its ranks has its rows of weight, `[V / tp, H]` in the order of the ranks
(not all need be as many: padding can be cut off), and the same hidden, labels and token_weight. Loss and gradients are
those of the whole: every rank has the loss and hidden's gradient, already summed, and its rows' gradient of weight.
Without `sum_hidden` it has its own share of hidden's gradient, for a caller who sums them otherwise, as the gradient of
a gather does. `tp_rows` says how many rows each rank has; without it the ranks tell each other, which waits for the
device. Four numbers of each token are exchanged on the way, never logits. A label that no rank has gets the loss NaN.
"""

from loongforge.kernels.linear_cross_entropy.eager import linear_cross_entropy as linear_cross_entropy
