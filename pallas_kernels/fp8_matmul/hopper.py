"""`fp8_matmul` on Hopper's tensor cores. Compiled for an H100 and interpreted, not run."""

import jax

from pallas_kernels.hopper import product, weight_gradient
from pallas_kernels.tiled import Tiled, tiles


def fp8_matmul(a_MK: Tiled, b_NK: Tiled, out_dtype: jax.typing.DTypeLike) -> jax.Array:
    """See the package for arguments."""
    if b_NK.scale.shape[0] == tiles(b_NK.q.shape[0]):
        b_1NK = Tiled(b_NK.q[None], b_NK.scale[None])
        return product.fp8(a_MK, b_1NK, out_dtype=out_dtype)
    return weight_gradient.fp8(a_MK, b_NK, out_dtype=out_dtype)
