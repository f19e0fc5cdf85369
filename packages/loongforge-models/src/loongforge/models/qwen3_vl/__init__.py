"""Qwen3-VL, dense and with experts."""
