"""Other projects' kernels behind the signatures of this wheel's ops: chosen by name alone, where they are installed.

`Registry.installed().op("rms_norm", impl="liger")`. Their priority is below that of every implementation here, so none
is ever chosen unasked; where one is not installed, the registry says what to install. Two are chosen by themselves:
`causal_convolution` and `gated_delta_rule` by `fla`, for which there is torch alone besides.
"""
