"""Text to batches: sources, packing, Grain pipelines. Knows nothing about models."""
