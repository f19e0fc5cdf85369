"""The vision encoder of Qwen2.5-VL."""
