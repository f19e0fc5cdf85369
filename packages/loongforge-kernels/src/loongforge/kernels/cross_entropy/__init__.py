"""`cross_entropy(logits, labels, ignore_index=-100) -> loss`: loss[t] = logsumexp(logits[t]) - logits[t, labels[t]].

logits `[..., V]` floating, labels `[...]` int64, loss `[...]` fp32 (fp64 for fp64 logits), 0 with zero gradient where
the label is `ignore_index`. No reduction: the caller knows which tokens count. Differentiable in logits.
"""

from loongforge.kernels.cross_entropy.eager import cross_entropy as cross_entropy
