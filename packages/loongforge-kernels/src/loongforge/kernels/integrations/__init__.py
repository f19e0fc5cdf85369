"""These kernels in other libraries: `transformers` and `megatron`, each a module with a function `register`.

Neither library is a dependency. Each is imported when its `register` is called.
"""
