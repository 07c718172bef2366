"""How a product is cut for Hopper: sizes that the hardware asks for, and the choice of a tile.

Knows nothing about operands. M rows, N columns.
"""

from typing import NamedTuple

ROWS = 128  # of a tile: twice what a WGMMA has
STEP_BYTES = 128  # of the contraction in a stage: a row of swizzled shared memory
SMEM_BYTES = 227 * 1024 - 4096  # of a CTA, less what barriers and alignment take
FEWEST_STAGES, MOST_STAGES = 4, 8
BYTES_A_CLOCK = 48  # that an SM is taken to get from L2; not measured


class Tiling(NamedTuple):
    """How a product is cut.

    Attributes:
        cols: of a CTA's tile; a multiple of 32 up to 192, of 64 where b has its columns last.
        stages: steps of the contraction in shared memory at once.
        pair: whether two CTAs with tiles beside each other form a cluster, of which each loads
            half of the rows that both need.
    """

    cols: int
    stages: int
    pair: bool


def choose_tiling(
    rows: int, cols: int, *, out_bytes: int, num_sms: int, k_major: bool = True
) -> Tiling:
    """The tile for which the busiest CTA has least to do, of math or of loads.

    A step of the contraction takes the tensor cores 4 clocks a column, for FP8 and BF16 alike.

    Args:
        rows: M.
        cols: N.
        out_bytes: of a number of the result.
        num_sms: CTAs that run at once.
        k_major: whether b has the contraction last.
    """

    def clocks(tiling: Tiling) -> float:
        tiles = -(-rows // ROWS) * -(-cols // tiling.cols)
        loaded_rows = tiling.cols + (ROWS // 2 if tiling.pair else ROWS)
        step = max(4.0 * tiling.cols, loaded_rows * STEP_BYTES / BYTES_A_CLOCK)
        return -(-tiles // num_sms) * step

    tilings = []
    for width in (192, 160, 128, 96, 64) if k_major else (192, 128, 64):
        # The result is staged whole, so that its store goes on beside the next tile.
        stages = (SMEM_BYTES - ROWS * width * out_bytes) // ((ROWS + width) * STEP_BYTES)
        pair = -(-cols // width) % 2 == 0 and num_sms % 2 == 0
        if stages >= FEWEST_STAGES:
            tilings.append(Tiling(width, min(stages, MOST_STAGES), pair))
    return min(tilings, key=clocks)  # of equals the widest
