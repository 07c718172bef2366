"""`grouped_matmul` expert by expert, and the gradient of its weights.

On CPU `jax.lax.ragged_dot` runs 50 to 100 times below a dense product, a batched product over
tiles copies a weight a tile, and a loop over tiles pays for a small product each. Here each expert
takes as many windows of rows as it needs, mostly one, and a window's rows that belong to others
are left as they are.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.tiled import Tiled, dequantize

MOST_ROWS = 2048  # of a step
GATHERED_NUMBERS = 1 << 19  # no slower than four times as many, and a decode step stays small


def product(
    x_XD: jax.Array, w_EDF: jax.Array, tile_expert: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """[X, F] = x @ w; transposed, [X, D] = x @ w^T of x [X, F]."""
    contract = 2 if transposed else 1
    tiles, num_experts = tile_expert.shape[0], w_EDF.shape[0]
    dimensions = (((1,), (contract - 1,)), ((), ()))
    y = jnp.zeros((x_XD.shape[0], w_EDF.shape[3 - contract]), x_XD.dtype)

    if tiles <= num_experts:  # decoding: most experts have no tile, so only the used are visited
        return _few_tiles(x_XD, w_EDF, tile_expert, contract)

    window = _window_rows(x_XD.shape[0], tiles, num_experts)

    def expert_step(y, expert):
        w, first, last = expert

        def step(i, y):
            start, mine = _window(first + i * window, last, window, x_XD.shape[0])
            x = jax.lax.dynamic_slice_in_dim(x_XD, start, window)
            new = jax.lax.dot_general(x, w, dimensions, preferred_element_type=jnp.float32)
            old = jax.lax.dynamic_slice_in_dim(y, start, window)
            return jax.lax.dynamic_update_slice_in_dim(
                y, jnp.where(mine, new.astype(y.dtype), old), start, 0
            )

        return jax.lax.fori_loop(0, -(-(last - first) // window), step, y), None

    ranges = _row_ranges(tile_expert, num_experts, x_XD.shape[0])
    return jax.lax.scan(expert_step, y, (w_EDF, *ranges))[0]


def _few_tiles(x_XD, w_EDF, tile_expert, contract):
    """Gathers the weights of as many tiles at once as fit a few MiB, which all cores share in."""
    tiles, num_experts = tile_expert.shape[0], w_EDF.shape[0]
    together = min(tiles, max(1, GATHERED_NUMBERS // (w_EDF.shape[1] * w_EDF.shape[2])))
    groups = -(-tiles // together)
    spare = groups * together - tiles
    x = x_XD.reshape(tiles, -1, x_XD.shape[1])
    x = jnp.pad(x, ((0, spare), (0, 0), (0, 0))).reshape(groups, together, *x.shape[1:])
    expert = jnp.pad(tile_expert, (0, spare), constant_values=num_experts)
    expert = expert.reshape(groups, together)
    dimensions = (((2,), (contract,)), ((0,), (0,)))

    def step(group, y):
        used = expert[group] < num_experts
        w = w_EDF.at[jnp.where(used, expert[group], 0)].get(mode="promise_in_bounds")
        product = jax.lax.dot_general(x[group], w, dimensions, preferred_element_type=jnp.float32)
        return y.at[group].set(jnp.where(used[:, None, None], product, 0).astype(y.dtype))

    y = jnp.zeros((*x.shape[:3], w_EDF.shape[3 - contract]), x_XD.dtype)
    busy = jnp.sum(expert[:, 0] < num_experts, dtype=jnp.int32)
    y = jax.lax.fori_loop(0, busy, step, y)
    return y.reshape(groups * together, *y.shape[2:])[:tiles].reshape(x_XD.shape[0], -1)


def _window_rows(rows: int, tiles: int, num_experts: int) -> int:
    """Rows a step: about an eighth more than an expert's mean share, up to some 2,048.

    The nearest number of tiles: with few rows an expert, rounding up would multiply twice as many
    as there are. The buffer of an exchange between devices holds far more rows than arrive.

    An even router then needs one product an expert. What a product costs beyond its operations is
    some 60 microseconds, as much as 80 rows of width 256 by 256.
    """
    block = rows // tiles
    share = rows + rows // 8
    tiles_a_step = max(1, round(share / (num_experts * block)))
    return min(rows, block * min(tiles_a_step, max(1, MOST_ROWS // block)))


def _window(first: jax.Array, last: jax.Array, window: int, rows: int):
    """Start of a window that begins at `first`, moved back where it would pass the end.

    Returns:
        (start, mask [window, 1] of its rows that lie in [first, last)).
    """
    start = jnp.minimum(first, rows - window)
    row = start + jnp.arange(window, dtype=jnp.int32)[:, None]
    return start, (row >= first) & (row < last)


def _row_ranges(tile_expert: jax.Array, num_experts: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """First and past-the-last row of each expert; tiles are sorted by expert."""
    experts = jnp.arange(num_experts + 1)
    border = jnp.searchsorted(tile_expert, experts, method="compare_all").astype(jnp.int32)
    border = border * (rows // tile_expert.shape[0])
    return border[:-1], border[1:]


def weight_gradient(
    x_XD: jax.Array,
    dy_XF: jax.Array,
    tile_expert: jax.Array,
    num_experts: int,
    *,
    rows_last: bool = False,
) -> jax.Array:
    """Sums x^T dy over the rows of each expert, in float32 [E, D, F].

    With `rows_last` the operands are [D, X] and [F, X].
    """
    axis = 1 if rows_last else 0
    rows, wide = x_XD.shape[axis], 1 - axis
    window = _window_rows(rows, tile_expert.shape[0], num_experts)
    contract_rows = (((axis,), (axis,)), ((), ()))

    def expert_step(_, range_):
        first, last = range_

        def step(i, total):
            start, mine = _window(first + i * window, last, window, rows)
            mine = mine.T if rows_last else mine
            x = jax.lax.dynamic_slice_in_dim(x_XD, start, window, axis)
            dy = jax.lax.dynamic_slice_in_dim(dy_XF, start, window, axis)
            return total + jax.lax.dot_general(
                jnp.where(mine, x, 0),
                jnp.where(mine, dy, 0),
                contract_rows,
                preferred_element_type=jnp.float32,
            )

        zero = jnp.zeros((x_XD.shape[wide], dy_XF.shape[wide]), jnp.float32)
        return None, jax.lax.fori_loop(0, -(-(last - first) // window), step, zero)

    return jax.lax.scan(expert_step, None, _row_ranges(tile_expert, num_experts, rows))[1]


def fp8_product(
    x_XK: Tiled, w_ENK: Tiled, tile_expert: jax.Array, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """`product` of what the FP8 numbers stand for, made wide first."""
    y_XN = product(dequantize(x_XK), dequantize(w_ENK), tile_expert, transposed=True)
    return y_XN.astype(out_dtype)


def fp8_weight_gradient(
    x_DX: Tiled, dy_FX: Tiled, tile_expert: jax.Array, num_experts: int
) -> jax.Array:
    """`weight_gradient` of what the FP8 numbers stand for, made wide first."""
    x, dy = dequantize(x_DX), dequantize(dy_FX)
    return weight_gradient(x, dy, tile_expert, num_experts, rows_last=True)
