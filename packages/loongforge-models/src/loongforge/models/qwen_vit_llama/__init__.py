"""A vision model of one's own: the encoder of Qwen2.5-VL before LLaMA 3."""
