"""Matrices in FP8 with a scale for every tile: what the FP8 ops take and return.

Source: DeepSeek-V3 report, section 3.3.2. Knows nothing about models or about how scales come about
(`pallas_kernels.quantize`).

M rows, K columns, m and k the tiles along them, rounded up.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

TILE = 128  # numbers that share a scale, or rows and columns of a block
LARGEST = 448.0  # of float8_e4m3fn

ScaleFormat = Literal["float32", "power_of_two"]


class Tiled(NamedTuple):
    """A matrix in FP8 and its scales; leading dimensions are matrices side by side.

    An element is its FP8 number times its tile's scale. Tiles at the edges are smaller.

    Attributes:
        q: float8_e4m3fn [..., M, K].
        scale: float32 [..., M, k] for tiles of 1x128, [..., m, k] for blocks of 128x128.
    """

    q: jax.Array
    scale: jax.Array


def tiles(size: int) -> int:
    """Tiles along a dimension."""
    return -(-size // TILE)


def dequantize(x: Tiled, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Each element times its tile's scale in float32, then in `dtype`."""
    scale = jnp.repeat(x.scale, TILE, axis=-1)[..., : x.q.shape[-1]]
    if x.scale.shape[-2] != x.q.shape[-2]:
        scale = jnp.repeat(scale, TILE, axis=-2)[..., : x.q.shape[-2], :]
    return (x.q.astype(jnp.float32) * scale).astype(dtype)


def transpose(x: Tiled) -> Tiled:
    """The transposed matrix of one in blocks of 128x128, which is exact."""
    return Tiled(jnp.swapaxes(x.q, -1, -2), jnp.swapaxes(x.scale, -1, -2))
