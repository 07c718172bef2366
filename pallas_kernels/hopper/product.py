"""a @ b^T on Hopper's tensor cores: FP8 with a scale for every tile, or BF16; dense or grouped.

Makes operands fit the kernel (`product_kernel`). Knows nothing about routing or gradients. Compiled
for an H100 and interpreted, not run.

M rows, N columns, K contracted; E matrices b, of which each 128 rows have one; m, n, k tiles of 128
along them.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.choose import Uncovered
from pallas_kernels.hopper import compat
from pallas_kernels.hopper.product_kernel import Product
from pallas_kernels.hopper.tiling import ROWS, STEP_BYTES, Tiling, choose_tiling
from pallas_kernels.tiled import Tiled


def fp8(
    a_MK: Tiled,
    b_ENK: Tiled,
    expert_m: jax.Array | None = None,
    *,
    out_dtype: jax.typing.DTypeLike,
    tiling: Tiling | None = None,
    num_sms: int | None = None,
) -> jax.Array:
    """Products in FP8, [M, N], summed in float32 every 128 of the contraction.

    Args:
        a_MK: in tiles of 1x128.
        b_ENK: in blocks of 128x128.
        expert_m: int32 [m], which b each 128 rows are multiplied with; those that have E or more
            come out zero. None: all have the first.
        out_dtype: float32 or bfloat16.
        tiling: None for `choose_tiling`'s.
        num_sms: CTAs that run at once; None for those of the device.

    Raises:
        Uncovered: for another dtype, or nothing to multiply.
    """
    if {a_MK.q.dtype, b_ENK.q.dtype} != {jnp.dtype(jnp.float8_e4m3fn)}:
        raise Uncovered(f"FP8 products of {a_MK.q.dtype} and {b_ENK.q.dtype}: float8_e4m3fn only")
    # Side by side, the scales of a tile's rows are few lines of cache.
    scale_kM = jnp.pad(a_MK.scale.T, ((0, 0), (0, -a_MK.q.shape[0] % ROWS)))
    scales = {"a_scale": scale_kM, "b_scale": b_ENK.scale}
    return _product(a_MK.q, b_ENK.q, scales, expert_m, True, out_dtype, tiling, num_sms)


def bf16(
    a_MK: jax.Array,
    b: jax.Array,
    expert_m: jax.Array | None = None,
    *,
    k_major: bool,
    tiling: Tiling | None = None,
    num_sms: int | None = None,
) -> jax.Array:
    """Products in bfloat16, [M, N], summed in float32.

    Args:
        a_MK: rows.
        b: [E, N, K] with `k_major`, else [E, K, N].
        expert_m: as in `fp8`.
        k_major: whether b has the contraction last.
        tiling: as in `fp8`.
        num_sms: as in `fp8`.

    Raises:
        Uncovered: for another dtype, or nothing to multiply.
    """
    if {a_MK.dtype, b.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise Uncovered(f"products of {a_MK.dtype} and {b.dtype}: bfloat16 only")
    return _product(a_MK, b, {}, expert_m, k_major, jnp.bfloat16, tiling, num_sms)


def _product(a_MK, b, scales, expert_m, k_major, out_dtype, tiling, num_sms):
    out_dtype = jnp.dtype(out_dtype)
    if out_dtype not in (jnp.float32, jnp.bfloat16):
        raise Uncovered(f"a result in {out_dtype}: float32 or bfloat16 only")
    (rows, width), cols = a_MK.shape, b.shape[1 if k_major else 2]
    if 0 in (rows, width, *b.shape):
        raise Uncovered(f"nothing to multiply: {a_MK.shape} by {b.shape}")
    num_sms = num_sms or compat.num_sms()
    tiling = tiling or choose_tiling(
        rows, cols, out_bytes=out_dtype.itemsize, num_sms=num_sms, k_major=k_major
    )
    # TMA wants rows of whole 16 bytes. Nothing else that is uneven needs padding: past the edges it
    # reads zeros and writes nothing.
    per_16_bytes = 16 // a_MK.dtype.itemsize
    spare = -width % per_16_bytes
    a_MK = jnp.pad(a_MK, ((0, 0), (0, spare)))
    edges = (0, spare), (0, -cols % per_16_bytes)
    b = jnp.pad(b, ((0, 0), (0, 0), edges[0]) if k_major else ((0, 0), *edges))
    out_cols = cols + -cols % (16 // out_dtype.itemsize)

    inputs = {"a": a_MK, "b": b, **scales}
    if expert_m is not None:
        inputs["expert"] = expert_m
    kernel = Product(
        row_tiles=-(-rows // ROWS),
        col_tiles=-(-cols // tiling.cols),
        steps=-(-width * a_MK.dtype.itemsize // STEP_BYTES),
        experts=b.shape[0],
        tiling=tiling,
        num_sms=num_sms,
        in_dtype=a_MK.dtype,
        out_dtype=out_dtype,
        k_major=k_major,
    )
    return kernel.build(tuple(inputs), (rows, out_cols))(*inputs.values())[:, :cols]
