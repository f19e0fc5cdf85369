"""The first Qwen."""
