"""float8_e4m3fn: numbers in blocks with a scale each, and which matrix products of a training step they speed up.

`quantize_1x128`, `quantize_128x128`, `quantize_rowwise`, `quantize_tensorwise`, `hadamard_quant` and `dequantize` are
described in `blocks`. `benchmark(shapes) -> Report` times a `GemmShape` in BF16 and FP8; `Policy.merge(*reports)` holds
what was measured and decides: `policy.decide(shape, device) -> Decision`.
"""

from loongforge.kernels.fp8.bench import benchmark as benchmark
from loongforge.kernels.fp8.blocks import dequantize as dequantize
from loongforge.kernels.fp8.blocks import hadamard_quant as hadamard_quant
from loongforge.kernels.fp8.blocks import quantize_1x128 as quantize_1x128
from loongforge.kernels.fp8.blocks import quantize_128x128 as quantize_128x128
from loongforge.kernels.fp8.blocks import quantize_rowwise as quantize_rowwise
from loongforge.kernels.fp8.blocks import quantize_tensorwise as quantize_tensorwise
from loongforge.kernels.fp8.engine import Engine as Engine
from loongforge.kernels.fp8.engine import Operand as Operand
from loongforge.kernels.fp8.policy import Decision as Decision
from loongforge.kernels.fp8.policy import Policy as Policy
from loongforge.kernels.fp8.report import Measurement as Measurement
from loongforge.kernels.fp8.report import Refusal as Refusal
from loongforge.kernels.fp8.report import Report as Report
from loongforge.kernels.fp8.shape import GemmShape as GemmShape
