"""Prefill, decode, sampling. Knows nothing of training or HTTP."""
