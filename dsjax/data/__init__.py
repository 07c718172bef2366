"""Text to batches: sources, token files, packing, mixing. Knows nothing about models."""

from dsjax.errors import RunError


class DataError(RunError):
    """Text or tokens that were good at the start cannot be read now; `str(error)` is one line."""
