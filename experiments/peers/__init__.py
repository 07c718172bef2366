"""Benchmarks against other implementations; `transformers_bench.py` runs in their interpreter."""
