"""Sizes that tests and benchmarks of `fp8_matmul` share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Rows of a, rows of b, what is contracted."""

    m: int
    n: int
    k: int


SHAPES = (
    Shape(1, 1, 1),
    Shape(3, 5, 128),
    Shape(64, 128, 256),
    Shape(130, 70, 300),  # no whole tiles in any dimension
    Shape(128, 256, 640),
)
# DeepGEMM's of DeepSeek-V3, for 4,096 tokens.
BENCH_SHAPES = (
    Shape(4096, 2112, 7168),
    Shape(4096, 24576, 1536),
    Shape(4096, 7168, 16384),
    Shape(4096, 7168, 2048),
    Shape(4096, 4096, 7168),
)
