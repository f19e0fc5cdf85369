"""Kernels of LoongForge: one folder per op, a torch reference beside every fast path, usable without the other wheels.

Each op is a plain function on torch tensors that runs on every device, for example
`from loongforge.kernels.rms_norm import rms_norm`. `loongforge.kernels.registry.Registry` finds faster implementations,
ours or another wheel's, and says why it refused the others. Importing this package imports nothing.
"""
