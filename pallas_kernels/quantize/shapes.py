"""Sizes that tests and benchmarks of `quantize` share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Rows and columns."""

    m: int
    k: int


SHAPES = (
    Shape(1, 1),
    Shape(3, 128),
    Shape(128, 5),
    Shape(64, 256),
    Shape(130, 300),  # no whole tiles either way
    Shape(256, 384),
)
BENCH_SHAPES = (Shape(4096, 7168), Shape(4096, 2048), Shape(128, 7168))
