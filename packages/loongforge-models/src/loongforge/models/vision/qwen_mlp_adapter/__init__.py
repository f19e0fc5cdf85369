"""The projector of the Qwen vision models."""
