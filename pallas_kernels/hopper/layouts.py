"""How arrays lie in the shared memory of a Hopper GPU. Knows nothing about kernels."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp


def swizzled(shape: tuple[int, ...], dtype: jax.typing.DTypeLike):
    """Shared memory as TMA writes and WGMMA reads it without bank conflicts.

    Args:
        shape: the last dimension has a multiple of 32 bytes, the one before a multiple of 8.
        dtype: of the numbers.

    Returns:
        A scratch type; swizzled by as much of 128, 64 or 32 bytes as divides the last dimension.
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))
