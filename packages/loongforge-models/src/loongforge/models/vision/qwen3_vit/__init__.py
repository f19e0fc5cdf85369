"""The vision encoder of Qwen3-VL."""
