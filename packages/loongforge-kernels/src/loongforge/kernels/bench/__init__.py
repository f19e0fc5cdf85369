"""Times, memory and rates of the ops against what one would use without them: `loongforge bench kernels`.

Alone: `python -m loongforge.kernels.bench --op dsa`. What is compared is checked to be equal first.
"""
