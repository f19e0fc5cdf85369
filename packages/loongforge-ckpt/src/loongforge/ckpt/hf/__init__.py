"""The Hugging Face checkpoint format: a directory of safetensors, `config.json` and tokenizer files."""
