"""The definition of `grouped_matmul`: one batched product over tiles, every weight gathered."""

import jax
import jax.numpy as jnp


def grouped_matmul(x_XD: jax.Array, w_EDF: jax.Array, tile_expert: jax.Array) -> jax.Array:
    """Gathers a weight a tile; see the package for arguments. Differentiated by JAX."""
    tiles = tile_expert.shape[0]
    x_tiles = x_XD.reshape(tiles, -1, x_XD.shape[1])
    # Out-of-range tiles read zeros, so that their rows come out zero.
    w_tiles = w_EDF.at[tile_expert].get(mode="fill", fill_value=0)
    y_tiles = jnp.einsum("txd,tdf->txf", x_tiles, w_tiles, preferred_element_type=jnp.float32)
    return y_tiles.reshape(x_XD.shape[0], -1).astype(x_XD.dtype)
