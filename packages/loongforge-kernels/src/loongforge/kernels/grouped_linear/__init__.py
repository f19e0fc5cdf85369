"""`grouped_linear(x, weights, counts) -> y`: every group of rows through a matrix of its own, as experts are.

x `[T, K]` holds the rows of group 0, then those of group 1, and so on; `counts` says how many of each, ints on the host
that sum to T, 0 included. `weights` are as many matrices `[N, K]`, each a tensor of its own; a group's rows of y
`[T, N]` are its rows of x times the transpose of its matrix. Dtype of x. Differentiable in x and in every matrix.
"""

from loongforge.kernels.grouped_linear.eager import grouped_linear as grouped_linear
