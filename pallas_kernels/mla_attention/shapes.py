"""Sizes that tests and benchmarks of `mla_attention` share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """B sequences of T, N heads, A key and H value width, lengths of the first row's documents."""

    b: int
    t: int
    n: int
    a: int
    h: int
    documents: tuple[int, ...]


SHAPES = (
    Shape(2, 24, 2, 12, 8, (24,)),
    Shape(2, 40, 2, 8, 12, (7, 20, 9)),  # four positions of padding
    Shape(1, 65, 1, 8, 8, (64, 1)),  # off the block
    Shape(3, 1, 2, 8, 4, (1,)),
    Shape(2, 64, 2, 12, 8, ()),  # nothing but padding in the first row
)
BENCH_SHAPES = (Shape(8, 512, 4, 48, 32, (512,)), Shape(1, 4096, 4, 48, 32, (4096,)))
