"""InternLM2 and InternLM2.5."""
