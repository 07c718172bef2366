"""`fp8_matmul` on TPUs. Compiled for v5p, v6e and tpu7x, interpreted, not run.

Where the matrix unit takes no FP8 (before tpu7x) the numbers become bfloat16 in VMEM: memory and
bandwidth are saved, time is not. Scaling every 128 keeps even tpu7x below its bfloat16 peak.

M rows, N columns, K contracted; s steps of t tiles of 128 along it.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_blocks
from pallas_kernels.tiled import TILE, Tiled

MOST = 1024  # rows and columns of a block


def fp8_matmul(a_MK: Tiled, b_NK: Tiled, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """See the package for arguments. A K that is no multiple of 128 costs a copy of both.

    Raises:
        Uncovered: for an empty dimension.
    """
    (rows, width), cols = a_MK.q.shape, b_NK.q.shape[0]
    bm, bn = tpu_blocks.cut(rows, MOST), tpu_blocks.cut(cols, MOST)
    count = tpu_blocks.tiles_a_step(width)
    a_MK, b_NK = tpu_blocks.widen(a_MK), tpu_blocks.widen(b_NK)
    bk = count * TILE
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((rows, cols), out_dtype),
        grid=(pl.cdiv(rows, bm), pl.cdiv(cols, bn), a_MK.q.shape[1] // bk),
        in_specs=[
            pl.BlockSpec((bm, bk), lambda m, n, s: (m, s)),
            pl.BlockSpec((None, count, bm), lambda m, n, s: (s, 0, m)),
            pl.BlockSpec((bn, bk), lambda m, n, s: (n, s)),
            pl.BlockSpec((None, count, bn), lambda m, n, s: (s, 0, n)),
        ],
        out_specs=pl.BlockSpec((bm, bn), lambda m, n, s: (m, n)),
        scratch_shapes=[pltpu.VMEM((bm, bn), jnp.float32)],
        compiler_params=tpu_blocks.compiler(parallel=2, sequential=1),
    )(
        a_MK.q,
        tpu_blocks.scale_rows(a_MK, count),
        b_NK.q,
        tpu_blocks.scale_rows(b_NK, count),
    )


def _kernel(a_ref, a_scale_ref, b_ref, b_scale_ref, y_ref, total_ref):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

    total_ref[...] += tpu_blocks.scaled_product(
        a_ref[...], a_scale_ref[...], b_ref[...], b_scale_ref[...]
    )

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        y_ref[...] = total_ref[...].astype(y_ref.dtype)
