"""The definition of `fp8_matmul`: a product a tile of the contraction, scaled and summed."""

import jax
import jax.numpy as jnp

from pallas_kernels.tiled import TILE, Tiled, tiles


def fp8_matmul(a_MK: Tiled, b_NK: Tiled, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """See the package for arguments. Never builds the products of all tiles at once."""
    (rows, width), cols = a_MK.q.shape, b_NK.q.shape[0]
    total = jnp.zeros((rows, cols), jnp.float32)
    for tile in range(tiles(width)):
        here = slice(tile * TILE, (tile + 1) * TILE)
        product = jnp.dot(
            a_MK.q[:, here].astype(jnp.float32),
            b_NK.q[:, here].astype(jnp.float32).T,
            precision=jax.lax.Precision.HIGHEST,
        )
        scale_N = b_NK.scale[:, tile]
        if scale_N.shape[0] != cols:
            scale_N = jnp.repeat(scale_N, TILE)[:cols]
        total = total + product * a_MK.scale[:, tile, None] * scale_N
    return total.astype(out_dtype)
