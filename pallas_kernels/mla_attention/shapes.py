"""Sizes that tests and benchmarks of `mla_attention` share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """B sequences of T, N heads, A key and H value width, lengths of the first row's documents.

    I heads of keys and values; None for as many as N.
    """

    b: int
    t: int
    n: int
    a: int
    h: int
    documents: tuple[int, ...]
    i: int | None = None


SHAPES = (
    Shape(2, 24, 2, 12, 8, (24,)),
    Shape(2, 40, 2, 8, 12, (7, 20, 9)),  # four positions of padding
    Shape(1, 65, 1, 8, 8, (64, 1)),  # off the block
    Shape(3, 1, 2, 8, 4, (1,)),
    Shape(2, 64, 2, 12, 8, ()),  # nothing but padding in the first row
    Shape(2, 40, 6, 8, 12, (7, 20, 9), 2),  # three query heads a key head
    Shape(1, 65, 4, 12, 8, (64, 1), 1),  # multi-query
)
BENCH_SHAPES = (
    Shape(8, 512, 4, 48, 32, (512,)),
    Shape(1, 4096, 4, 48, 32, (4096,)),
    Shape(1, 2048, 12, 128, 128, (2048,), 2),
)
