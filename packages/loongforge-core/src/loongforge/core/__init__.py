"""The thin trainer: config -> plan -> model -> data -> step -> checkpoint, on unmodified megatron-core."""
