"""Measures of a trained model that are no loss. Knows nothing about training."""
