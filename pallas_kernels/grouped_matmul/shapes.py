"""Sizes that tests and benchmarks of `grouped_matmul` share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Row counts a group, the tile's rows, and the weight's sizes."""

    sizes: tuple[int, ...]
    block: int
    d: int
    f: int


SHAPES = (
    Shape((5, 0, 7, 4), 4, 8, 12),  # an empty group, rows that do not fill their tiles
    Shape((0, 0, 0, 9), 8, 16, 8),  # one group gets everything
    Shape((1, 1, 1, 1), 1, 8, 8),  # decode: one row a tile
    Shape((0, 0), 4, 8, 8),  # nothing at all
    Shape((130, 70, 128, 0, 1, 60, 33, 90), 32, 64, 48),
)
BENCH_SHAPES = tuple(
    Shape(sizes=(4096 // groups,) * groups, block=64, d=512, f=256) for groups in (8, 32, 64)
)
