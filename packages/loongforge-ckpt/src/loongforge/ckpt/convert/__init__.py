"""`loongforge convert`: between a Hugging Face directory and a checkpoint of ours, without training."""
