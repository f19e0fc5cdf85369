"""`loongforge verify`: our model against transformers', number by number."""
