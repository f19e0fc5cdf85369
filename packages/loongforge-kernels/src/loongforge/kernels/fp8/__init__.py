"""float8_e4m3fn: numbers in blocks with a scale each; `blocks` describes the ops."""

from loongforge.kernels.fp8.blocks import dequantize as dequantize
from loongforge.kernels.fp8.blocks import hadamard_quant as hadamard_quant
from loongforge.kernels.fp8.blocks import quantize_1x128 as quantize_1x128
from loongforge.kernels.fp8.blocks import quantize_128x128 as quantize_128x128
from loongforge.kernels.fp8.blocks import quantize_rowwise as quantize_rowwise
from loongforge.kernels.fp8.blocks import quantize_tensorwise as quantize_tensorwise
