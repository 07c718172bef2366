"""Sizes that tests and benchmarks of `mla_decode` share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """T queries of N heads over latents of C and rope keys of R; cached lengths by sequence."""

    t: int
    n: int
    c: int
    r: int
    lengths: tuple[int, ...]
    table_width: int


SHAPES = (
    Shape(1, 2, 16, 8, (1, 64, 65), 2),  # on and off the page
    Shape(2, 4, 16, 8, (130, 0, 7), 3),  # an empty sequence, two positions at once
    Shape(5, 2, 8, 4, (5, 70), 20),  # a chunk of a prefill, a table longer than one step
)
FP8 = Shape(1, 2, 256, 16, (70, 3), 2)  # two tiles of 128, one scale each
