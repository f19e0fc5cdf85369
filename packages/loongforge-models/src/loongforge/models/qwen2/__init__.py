"""Qwen2.5, dense."""
