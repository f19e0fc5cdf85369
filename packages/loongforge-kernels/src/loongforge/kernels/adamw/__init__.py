"""`adamw(parameters, gradients, first_moments, second_moments, *, step, lr, ...)`: one AdamW step in place.

Four lists of tensors of equal shapes, one dtype and one device; `step` counts from 1. With g the gradient:
m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; p = (1 - lr weight_decay) p - lr m' / (sqrt(v') + eps),
where m' and v' are corrected for their start at zero.
"""

from loongforge.kernels.adamw.eager import adamw as adamw
