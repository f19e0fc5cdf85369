"""DeepSeek-V2."""
