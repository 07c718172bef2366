"""`grouped_matmul` on TPUs. Compiled for v5p, v6e and tpu7x, interpreted, not run.

A step takes one tile of rows whole along what is contracted, and the weight of its group: its block
stays in VMEM until the group changes. No tile crosses groups, so nothing is masked, which jax's own
`megablox` does for every step, and rows that belong to nobody come out zero, which there they do
not. Knows nothing about routing.

X rows, D contracted, F columns, E groups; K contracted and N columns of FP8's operands, in s steps
of t tiles of 128; V steps of a weight gradient.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_blocks
from pallas_kernels.choose import Uncovered
from pallas_kernels.tiled import TILE, Tiled

WEIGHT_BYTES = 8 << 20  # of a weight's block, of which two are in VMEM
MOST = 1024  # rows and columns of a block of a weight's gradient

CONTRACT_LAST = (((1,), (1,)), ((), ()))


def product(
    x_XD: jax.Array, w_EDF: jax.Array, tile_expert: jax.Array, *, transposed: bool = False
) -> jax.Array:
    """See the package for arguments; transposed, x is [X, F] and the result [X, D].

    Raises:
        Uncovered: for tiles that are no multiple of 16 rows in bfloat16 or 8 in float32, or rows
            too long for VMEM.
    """
    rows, width = x_XD.shape
    cols = w_EDF.shape[1 if transposed else 2]
    block = _block(rows, tile_expert, 32 // x_XD.dtype.itemsize)
    cut = _columns(cols, width, x_XD.dtype)
    if transposed:
        w_spec = pl.BlockSpec((None, cut, width), lambda f, x, *visit: (_group(x, *visit), f, 0))
    else:
        w_spec = pl.BlockSpec((None, width, cut), lambda f, x, *visit: (_group(x, *visit), 0, f))
    contract = CONTRACT_LAST if transposed else (((1,), (0,)), ((), ()))
    return pl.pallas_call(
        functools.partial(_product_kernel, contract=contract),
        out_shape=jax.ShapeDtypeStruct((rows, cols), x_XD.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(cols, cut), rows // block),
            in_specs=[
                pl.BlockSpec((block, width), lambda f, x, *visit: (_tile(x, *visit), 0)),
                w_spec,
            ],
            out_specs=pl.BlockSpec((block, cut), lambda f, x, *_: (x, f)),
        ),
        compiler_params=tpu_blocks.compiler(parallel=1, sequential=1),
    )(*_used(tile_expert, w_EDF.shape[0]), x_XD, w_EDF)


def _product_kernel(expert, used, x_ref, w_ref, y_ref, *, contract):
    del expert
    here = pl.program_id(1) < used[0]

    @pl.when(here)
    def _():
        y_ref[...] = _dot(x_ref[...], w_ref[...], contract).astype(y_ref.dtype)

    @pl.when(~here)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)


def weight_gradient(
    x_XD: jax.Array, dy_XF: jax.Array, tile_expert: jax.Array, num_experts: int
) -> jax.Array:
    """Sums x^T dy over the rows of each expert, in float32 [E, D, F].

    Raises:
        Uncovered: as `product`.
    """
    rows, width = x_XD.shape
    cols = dy_XF.shape[1]
    block = _block(rows, tile_expert, 32 // x_XD.dtype.itemsize)
    bd, bf = tpu_blocks.cut(width, MOST), tpu_blocks.cut(cols, MOST)
    return _sum_over_tiles(
        _gradient_kernel,
        [
            pl.BlockSpec((block, bd), lambda d, f, v, expert, tile, busy: (tile[v], d)),
            pl.BlockSpec((block, bf), lambda d, f, v, expert, tile, busy: (tile[v], f)),
        ],
        (num_experts, width, cols),
        (bd, bf),
        tile_expert,
    )(x_XD, dy_XF)


def _gradient_kernel(expert, tile, busy, x_ref, dy_ref, dw_ref):
    del tile
    _add(expert, busy, dw_ref, lambda: _dot(x_ref[...], dy_ref[...], (((0,), (0,)), ((), ()))))


def fp8_product(
    x_XK: Tiled, w_ENK: Tiled, tile_expert: jax.Array, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """See the package for arguments. A K that is no multiple of 128 costs a copy of both.

    Raises:
        Uncovered: for tiles that are no multiple of 128 rows, or rows too long for VMEM.
    """
    rows, width = x_XK.q.shape
    cols = w_ENK.q.shape[1]
    block = _block(rows, tile_expert, TILE)
    count = tpu_blocks.tiles_a_step(width)
    x_XK, w_ENK = tpu_blocks.widen(x_XK), tpu_blocks.widen(w_ENK)
    width = x_XK.q.shape[1]
    steps = width // (count * TILE)
    cut = min(_columns(cols, width, x_XK.q.dtype), tpu_blocks.cut(cols, MOST))
    return pl.pallas_call(
        _fp8_product_kernel,
        out_shape=jax.ShapeDtypeStruct((rows, cols), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(cols, cut), rows // block),
            in_specs=[
                pl.BlockSpec((block, width), lambda n, x, *visit: (_tile(x, *visit), 0)),
                pl.BlockSpec((steps, count, block), lambda n, x, *visit: (0, 0, _tile(x, *visit))),
                pl.BlockSpec((None, cut, width), lambda n, x, *visit: (_group(x, *visit), n, 0)),
                pl.BlockSpec(
                    (None, steps, count, cut), lambda n, x, *visit: (_group(x, *visit), 0, 0, n)
                ),
            ],
            out_specs=pl.BlockSpec((block, cut), lambda n, x, *_: (x, n)),
            scratch_shapes=[pltpu.VMEM((block, cut), jnp.float32)],
        ),
        compiler_params=tpu_blocks.compiler(parallel=1, sequential=1),
    )(
        *_used(tile_expert, w_ENK.q.shape[0]),
        x_XK.q,
        tpu_blocks.scale_rows(x_XK, count),
        w_ENK.q,
        tpu_blocks.scale_rows(w_ENK, count),
    )


def _fp8_product_kernel(expert, used, x_ref, x_scale_ref, w_ref, w_scale_ref, y_ref, total_ref):
    del expert
    here = pl.program_id(1) < used[0]
    steps, count, _ = x_scale_ref.shape
    wide = count * TILE

    @pl.when(here)
    def _():
        total_ref[...] = jnp.zeros_like(total_ref)

        @pl.loop(0, steps)
        def _(step):
            part = pl.ds(pl.multiple_of(step * wide, wide), wide)
            total_ref[...] += tpu_blocks.scaled_product(
                x_ref[:, part], x_scale_ref[step], w_ref[:, part], w_scale_ref[step]
            )

        y_ref[...] = total_ref[...].astype(y_ref.dtype)

    @pl.when(~here)
    def _():
        y_ref[...] = jnp.zeros_like(y_ref)


def fp8_weight_gradient(
    x_DX: Tiled, dy_FX: Tiled, tile_expert: jax.Array, num_experts: int
) -> jax.Array:
    """See the package for arguments.

    Raises:
        Uncovered: for an empty dimension.
    """
    (width, rows), cols = x_DX.q.shape, dy_FX.q.shape[0]
    block = _block(rows, tile_expert, TILE)
    count = block // TILE
    bd, bf = tpu_blocks.cut(width, MOST), tpu_blocks.cut(cols, MOST)
    return _sum_over_tiles(
        _fp8_gradient_kernel,
        [
            pl.BlockSpec((bd, block), lambda d, f, v, expert, tile, busy: (d, tile[v])),
            pl.BlockSpec((None, count, bd), lambda d, f, v, expert, tile, busy: (tile[v], 0, d)),
            pl.BlockSpec((bf, block), lambda d, f, v, expert, tile, busy: (f, tile[v])),
            pl.BlockSpec((None, count, bf), lambda d, f, v, expert, tile, busy: (tile[v], 0, f)),
        ],
        (num_experts, width, cols),
        (bd, bf),
        tile_expert,
    )(x_DX.q, tpu_blocks.scale_rows(x_DX, count), dy_FX.q, tpu_blocks.scale_rows(dy_FX, count))


def _fp8_gradient_kernel(expert, tile, busy, x_ref, x_scale_ref, dy_ref, dy_scale_ref, dw_ref):
    del tile
    operands = (x_ref, x_scale_ref, dy_ref, dy_scale_ref)
    _add(expert, busy, dw_ref, lambda: tpu_blocks.scaled_product(*(ref[...] for ref in operands)))


# ---- products: a step a tile ------------------------------------------------------------------


def _used(tile_expert, num_experts):
    """(expert of each tile, int32; how many tiles are used, int32 [1])."""
    used = jnp.sum(tile_expert < num_experts, dtype=jnp.int32)
    return jnp.minimum(tile_expert, num_experts - 1).astype(jnp.int32), used[None]


def _tile(step, expert, used):
    """The rows that a step reads: for an unused tile those that are in VMEM anyway."""
    del expert
    return jnp.minimum(step, jnp.maximum(used[0] - 1, 0))


def _group(step, expert, used):
    """The weight that a step reads."""
    return expert[_tile(step, expert, used)]


# ---- gradients: a step a tile, and one for a group without -------------------------------------


def _sum_over_tiles(kernel, in_specs, shape, blocks, tile_expert):
    """A call with grid (D, F, V) that adds up the tiles of each group, float32 [E, D, F]."""
    (experts, width, cols), (bd, bf) = shape, blocks
    schedule = _schedule(tile_expert, experts)
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(width, bd), pl.cdiv(cols, bf), schedule[0].size),
            in_specs=in_specs,
            out_specs=pl.BlockSpec(
                (None, bd, bf), lambda d, f, v, expert, tile, busy: (expert[v], d, f)
            ),
        ),
        compiler_params=tpu_blocks.compiler(parallel=2, sequential=1),
    )
    return functools.partial(call, *schedule)


def _schedule(tile_expert, num_experts):
    """Which group and tile each step sees, and whether it has work; every group is seen.

    Returns:
        int32 [tiles + E] each; groups ascend, and steps left over repeat the last without work.
    """
    (tiles,) = tile_expert.shape
    tiles_E = jnp.zeros(num_experts, jnp.int32).at[tile_expert].add(1, mode="drop")
    steps_E = jnp.maximum(tiles_E, 1)
    total = tiles + num_experts
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    expert_V = jnp.repeat(experts, steps_E, total_repeat_length=total)
    nth_V = jnp.arange(total, dtype=jnp.int32) - (jnp.cumsum(steps_E) - steps_E)[expert_V]
    of_group_V = tiles_E[expert_V]
    first_V = (jnp.cumsum(tiles_E) - tiles_E)[expert_V]
    tile_V = first_V + jnp.minimum(nth_V, jnp.maximum(of_group_V - 1, 0))
    return expert_V, jnp.minimum(tile_V, tiles - 1), (nth_V < of_group_V).astype(jnp.int32)


def _add(expert, busy, dw_ref, gradient):
    """A step of a group's sum, which lies in VMEM until the group changes."""
    step = pl.program_id(2)

    @pl.when((step == 0) | (expert[step] != expert[jnp.maximum(step - 1, 0)]))
    def _():
        dw_ref[...] = jnp.zeros_like(dw_ref)

    @pl.when(busy[step] != 0)
    def _():
        dw_ref[...] += gradient()


# ---- sizes --------------------------------------------------------------------------------------


def _block(rows, tile_expert, multiple):
    block = rows // tile_expert.shape[0]
    if block == 0 or block % multiple:
        raise Uncovered(f"tiles of {block} rows; multiples of {multiple} are taken")
    return block


def _columns(cols, width, dtype):
    """Columns of a weight's block that is whole along `width`."""
    most = WEIGHT_BYTES // (width * jnp.dtype(dtype).itemsize) // TILE * TILE
    if most == 0:
        longest = WEIGHT_BYTES // (TILE * jnp.dtype(dtype).itemsize)
        raise Uncovered(f"rows of {width} {jnp.dtype(dtype).name}; up to {longest} are taken")
    return tpu_blocks.cut(cols, most)


def _dot(a, b, contract):
    """A product in float32; float32 operands are not rounded to bfloat16 first."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, contract, precision=precision, preferred_element_type=jnp.float32
    )
