"""A new model package, made from a family that is registered: `loongforge new-model`."""
