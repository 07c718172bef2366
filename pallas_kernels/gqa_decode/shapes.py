"""Sizes that tests and benchmarks of `gqa_decode` share."""

from typing import NamedTuple


class Shape(NamedTuple):
    """T queries of N heads over I key/value heads of widths A and H; cached lengths by sequence."""

    t: int
    n: int
    i: int
    a: int
    h: int
    lengths: tuple[int, ...]
    table_width: int


SHAPES = (
    Shape(1, 4, 2, 16, 16, (1, 64, 65), 2),  # on and off the page
    Shape(2, 6, 2, 16, 8, (130, 0, 7), 3),  # an empty sequence, two positions at once
    Shape(5, 2, 2, 8, 12, (5, 70), 20),  # a head each; a chunk of a prefill, a table of steps
    Shape(1, 4, 1, 8, 8, (90,), 2),  # multi-query
)
