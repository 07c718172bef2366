"""Formats of the outside world: tokenizers, Hugging Face checkpoints. Knows nothing of training."""
