"""Acme's vision encoder for LoongForge. Importing this does nothing; see spec.py."""
