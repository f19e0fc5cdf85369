"""PEFT's format of adapters: `adapter_config.json` and `adapter_model.safetensors`."""
