"""The definitions: one batched product over tiles, every weight gathered."""

import jax
import jax.numpy as jnp

from pallas_kernels.tiled import Tiled, dequantize


def product(
    x_XD: jax.Array, w_EDF: jax.Array, tile_expert: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """Gathers a weight a tile; transposed, x is [X, F] and the result [X, D]."""
    w_EDF = jnp.swapaxes(w_EDF, 1, 2) if transposed else w_EDF
    tiles = tile_expert.shape[0]
    x_tiles = x_XD.reshape(tiles, -1, x_XD.shape[1])
    # Out-of-range tiles read zeros, so that their rows come out zero.
    w_tiles = w_EDF.at[tile_expert].get(mode="fill", fill_value=0)
    y_tiles = jnp.einsum("txd,tdf->txf", x_tiles, w_tiles, preferred_element_type=jnp.float32)
    return y_tiles.reshape(x_XD.shape[0], -1).astype(x_XD.dtype)


def weight_gradient(
    x_XD: jax.Array, dy_XF: jax.Array, tile_expert: jax.Array, num_experts: int
) -> jax.Array:
    """Sums x^T dy over the rows of each expert, in float32 [E, D, F]."""
    tiles = tile_expert.shape[0]
    x_tiles, dy_tiles = (rows.reshape(tiles, -1, rows.shape[1]) for rows in (x_XD, dy_XF))
    products = jnp.einsum("txd,txf->tdf", x_tiles, dy_tiles, preferred_element_type=jnp.float32)
    total = jnp.zeros((num_experts, *products.shape[1:]), jnp.float32)
    return total.at[tile_expert].add(products, mode="drop")


def fp8_product(
    x_XK: Tiled, w_ENK: Tiled, tile_expert: jax.Array, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """`product` of what the FP8 numbers stand for."""
    y_XN = product(dequantize(x_XK), dequantize(w_ENK), tile_expert, transposed=True)
    return y_XN.astype(out_dtype)


def fp8_weight_gradient(
    x_DX: Tiled, dy_FX: Tiled, tile_expert: jax.Array, num_experts: int
) -> jax.Array:
    """`weight_gradient` of what the FP8 numbers stand for."""
    return weight_gradient(dequantize(x_DX).T, dequantize(dy_FX).T, tile_expert, num_experts)
