"""`grouped_matmul` on Hopper's tensor cores. Compiled for an H100 and interpreted, not run."""

import jax
import jax.numpy as jnp

from pallas_kernels.choose import Uncovered
from pallas_kernels.hopper import product as products
from pallas_kernels.hopper import weight_gradient as weight_gradients
from pallas_kernels.hopper.groups import find_groups
from pallas_kernels.hopper.tiling import ROWS
from pallas_kernels.tiled import Tiled


def product(
    x_XD: jax.Array, w_EDF: jax.Array, tile_expert: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """[X, F] = x @ w; transposed, [X, D] = x @ w^T of x [X, F]."""
    expert_m = _expert_m(x_XD.shape[0], tile_expert)
    return products.bf16(x_XD, w_EDF, expert_m, k_major=transposed)


def fp8_product(
    x_XK: Tiled, w_ENK: Tiled, tile_expert: jax.Array, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """[X, N] = x @ w^T."""
    return products.fp8(x_XK, w_ENK, _expert_m(x_XK.q.shape[0], tile_expert), out_dtype=out_dtype)


def _expert_m(rows: int, tile_expert: jax.Array) -> jax.Array:
    """The expert of each 128 rows."""
    block = rows // tile_expert.shape[0]
    if block % ROWS:
        raise Uncovered(f"tiles of {block} rows; multiples of {ROWS} are taken")
    return jnp.repeat(tile_expert, block // ROWS)


def weight_gradient(
    x_XD: jax.Array, dy_XF: jax.Array, tile_expert: jax.Array, num_experts: int
) -> jax.Array:
    """Sums x^T dy over the rows of each expert, in float32 [E, D, F]."""
    steps = _steps(x_XD.shape[0], tile_expert, weight_gradients.BF16_STEP)
    groups_E = find_groups(tile_expert, num_experts, steps)
    return weight_gradients.bf16(x_XD, dy_XF, groups_E)


def fp8_weight_gradient(
    x_DX: Tiled, dy_FX: Tiled, tile_expert: jax.Array, num_experts: int
) -> jax.Array:
    """Sums x dy^T over the rows of each expert, in float32 [E, D, F]."""
    steps = _steps(x_DX.q.shape[1], tile_expert, weight_gradients.FP8_STEP)
    groups_E = find_groups(tile_expert, num_experts, steps)
    return weight_gradients.fp8(x_DX, dy_FX, groups_E)


def _steps(rows: int, tile_expert: jax.Array, step: int) -> int:
    """Steps of the contraction that a tile of rows takes."""
    block = rows // tile_expert.shape[0]
    if block % step:
        raise Uncovered(f"tiles of {block} rows; multiples of {step} are taken")
    return block // step
