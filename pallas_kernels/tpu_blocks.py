"""What the kernels for TPUs share: how a dimension is cut, and a step of a product in FP8.

Knows nothing about which matrices are multiplied.

M rows, N columns, K contracted, k its tiles of 128; s blocks of t tiles each.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.choose import Uncovered
from pallas_kernels.tiled import TILE, Tiled, tiles

VMEM_BYTES = 48 << 20  # for a kernel's blocks; a core has 64 MiB or more (v5p, v6e, tpu7x)


def cut(size: int, most: int, multiple: int = TILE) -> int:
    """The size of a dimension's blocks: all of it, or parts as even as multiples allow.

    Raises:
        Uncovered: for an empty dimension.
    """
    if size == 0:
        raise Uncovered("an empty dimension; at least 1 is taken")
    if size <= most:
        return size
    part = -(-size // -(-size // most))
    return -(-part // multiple) * multiple


def compiler(parallel: int, sequential: int = 0) -> pltpu.CompilerParams:
    """Parameters of a kernel, for that many dimensions of its grid, those in order last."""
    order = (*[pltpu.PARALLEL] * parallel, *[pltpu.ARBITRARY] * sequential)
    return pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=VMEM_BYTES)


def multiplied_dtype() -> jax.typing.DTypeLike:
    """What the matrix unit takes for FP8: float8_e4m3fn where it can, otherwise bfloat16.

    Every FP8 number is a bfloat16, so both give the same products.
    """
    fp8 = jnp.float8_e4m3fn
    if pltpu.is_tpu_device() and pltpu.get_tpu_info().is_matmul_supported(fp8, fp8):
        return fp8
    return jnp.bfloat16


def widen(x: Tiled) -> Tiled:
    """Columns up to the next multiple of 128, with zeros: a copy if there are any to add."""
    *lead, width = x.q.shape
    spare = tiles(width) * TILE - width
    return Tiled(jnp.pad(x.q, [*((0, 0) for _ in lead), (0, spare)]), x.scale)


def tiles_a_step(width: int) -> int:
    """Tiles of 128 that a step contracts, up to 4; they divide those of the width."""
    return max(count for count in (1, 2, 3, 4) if tiles(width) % count == 0)


def scale_rows(x: Tiled, count: int) -> jax.Array:
    """The scales of a matrix [..., M, K] as rows that run along M, float32 [..., s, t, M].

    A scale a row of 128 would take 128 lanes in a column; a block's is repeated for its rows.

    Args:
        x: in tiles of 1x128 or 128x128.
        count: t.
    """
    scale, rows = x.scale, x.q.shape[-2]
    if scale.shape[-2] != rows:
        scale = jnp.repeat(scale, TILE, axis=-2)[..., :rows, :]
    scale = jnp.swapaxes(scale, -1, -2)
    return scale.reshape(*scale.shape[:-2], -1, count, rows)


def scaled_product(
    a_MK: jax.Array, a_scale_tM: jax.Array, b_NK: jax.Array, b_scale_tN: jax.Array
) -> jax.Array:
    """The product a @ b^T of a step's blocks, each 128 of it scaled in float32, [M, N].

    The matrix unit sums 128 at a time, half of its depth where that is 256; multiplying and adding
    what comes out is three operations an element, and the vector unit's time is the kernel's.
    """
    dtype = multiplied_dtype()
    a, b, a_scale_Mt = a_MK.astype(dtype), b_NK.astype(dtype), a_scale_tM.T
    total_MN = jnp.zeros((a.shape[0], b.shape[0]), jnp.float32)
    for tile in range(a_scale_tM.shape[0]):
        here = slice(tile * TILE, (tile + 1) * TILE)
        product_MN = jax.lax.dot_general(
            a[:, here], b[:, here], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        total_MN += product_MN * a_scale_Mt[:, tile, None] * b_scale_tN[tile, None, :]
    return total_MN
