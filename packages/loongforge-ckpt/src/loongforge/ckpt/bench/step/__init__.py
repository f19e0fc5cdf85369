"""`loongforge bench step`: one training step of ours against what one would use instead, on the same weights."""
