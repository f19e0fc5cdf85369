"""Measurements of models on their checkpoints."""
