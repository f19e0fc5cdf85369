"""The only door to megatron-core: its start, its groups, its configuration, our layers over it, its optimizer.

What megatron-core keeps in module globals (parallel state, random states) is touched here and nowhere else; everything
leaves as an explicit `World` and `ProcessGroupCollection`.
"""
