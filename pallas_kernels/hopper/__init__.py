"""What the Hopper implementations of several ops are made of, in Pallas Mosaic GPU (sm_90a).

Knows nothing about ops: shapes are checked and made fit by the op's `hopper.py`. Compiled for an
H100 and interpreted, not run on one.
"""
