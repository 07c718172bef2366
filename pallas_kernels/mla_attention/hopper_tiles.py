"""What the Hopper kernels of `mla_attention` share: their warpgroups, and tiles in registers.

Knows nothing about which products they make.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

MATH_WARPGROUPS = 2
LOADER = MATH_WARPGROUPS  # index of the warpgroup that loads
LOADER_REGISTERS, MATH_REGISTERS = 24, 240  # a thread; 128 * (24 + 2 * 240) of the SM's 65,536
ROWS_EACH = 64  # of a warpgroup: as many as a WGMMA has
ROWS = MATH_WARPGROUPS * ROWS_EACH  # of a CTA
CHUNK = 64  # numbers of a row of swizzled shared memory, in BF16
LOG2E = 1.4426950408889634  # exponentials are to base 2, as the hardware's are
GRID = "sequence", "head", "tile"

BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


def kernel(
    body: Callable,
    *,
    out_type: Any,
    scratch_types: Mapping[str, Any],
    grid: tuple[int, int, int],
    name: str,
) -> Callable:
    """A kernel of two warpgroups that multiply and one that loads.

    The tiles of a head run together, and find what they all read in L2.
    """
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=grid,
        grid_names=GRID,
        num_threads=MATH_WARPGROUPS + 1,
        thread_name="warpgroup",
        # Without the compiler's barriers, safe because no warpgroup writes shared memory that it or
        # another one reads without one of ours; without scratch, for reductions along rows alone.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name=name,
    )


def place(tiles: int):
    """(sequence, head, tile) of a CTA that owns queries, the last ones first.

    They have the most keys, and all SMs should end together.
    """
    sequence, head, tile = (lax.axis_index(name) for name in GRID)
    return sequence, head, tiles - 1 - tile


def rows_of(tile, half) -> pl.Slice:
    """The rows of a warpgroup of a CTA's tile."""
    return pl.ds(tile * ROWS + half * ROWS_EACH, ROWS_EACH)


def stage_of(position, stages: int):
    """Index of a position's stage in a ring."""
    return lax.rem(position, jnp.int32(stages))


def drain(count, stages: int, *free: Any) -> None:
    """Waits until nobody reads the last stages that were filled."""

    @pl.loop(lax.max(count - stages, jnp.int32(0)), count)
    def _wait(i):
        for barriers in free:
            plgpu.barrier_wait(barriers.at[stage_of(i, stages)])


def store(rows, stage, target) -> None:
    """Begins to store rows, through shared memory that nobody reads any more."""
    stage[...] = rows.astype(stage.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(stage, target)


def along_rows(x, shape):
    """A number for each row of a tile, in all of its columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def along_columns(x, shape):
    """A number for each column of a tile, in all of its rows."""
    return lax.broadcast_in_dim(x, shape, (1,))


def index_of(shape, dim: int, first):
    """The rows (0) or columns (1) of a tile, by number."""
    return first + plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA)


def sees(row, start, key):
    """Whether the query of a row, whose document starts at another, sees the key of a third."""
    return (key <= row) & (key >= start)


def exp2(scores, scale: float, less):
    """2 to the power of scaled scores less something: one multiplication and addition each."""
    return jnp.exp2(scores * (scale * LOG2E) - less)


def zeros(*shape: int):
    """float32, as a WGMMA's result lies; of one dimension, as its rows do."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else BY_ROW
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
