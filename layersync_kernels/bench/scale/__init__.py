"""A paper model of training on many GPUs."""
