"""Acme's LLaMA models for LoongForge. Importing this does nothing; see spec.py."""
