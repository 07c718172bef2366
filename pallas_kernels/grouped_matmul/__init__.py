"""Matrix products of row groups with one weight a group: the experts' matmul.

Rows lie sorted by group and padded to whole blocks, so that no block crosses a group (the layout of
DeepGEMM's contiguous grouped GEMM). Knows nothing about routing.

X rows (a multiple of the block), D contracted, F columns, E groups; K contracted and N columns of
FP8's operands, which both lie along what is contracted.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import choose
from pallas_kernels.tiled import TILE, Tiled, tiles

KNOWN = ("reference", "hopper", "tpu", "xla")


def grouped_matmul(
    x_XD: jax.Array,
    w_EDF: jax.Array,
    tile_expert: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies each block of rows with the weight of its group.

    Args:
        x_XD: rows, X = number of tiles * block. Padding rows inside a tile must be zero for the
            weight gradient to be exact.
        w_EDF: one weight a group, of the same dtype.
        tile_expert: int32 [X / block]; group of each tile. Used tiles come first; E or more marks
            an unused one, whose rows come out zero.
        implementation: "hopper", "tpu", "xla" (expert by expert, for CPU), "reference", or None,
            which takes the best one for the target.

    Returns:
        [X, F] in the dtype of `x_XD`, accumulated in float32.

    Raises:
        ValueError: if the tiles do not divide the rows, the shapes do not go together, or the
            implementation is unknown.
    """
    _block(x_XD.shape[0], tile_expert)
    if w_EDF.ndim != 3 or w_EDF.shape[1] != x_XD.shape[1]:
        raise ValueError(f"rows of width {x_XD.shape[1]} against weights of shape {w_EDF.shape}")
    return _differentiable(x_XD, w_EDF, tile_expert, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _differentiable(x_XD, w_EDF, tile_expert, implementation):
    return _run("product", implementation, x_XD, w_EDF, tile_expert)


def _forward(x_XD, w_EDF, tile_expert, implementation):
    y_XF = _run("product", implementation, x_XD, w_EDF, tile_expert)
    return y_XF, (x_XD, w_EDF, tile_expert)


def _backward(implementation, saved, dy_XF):
    x_XD, w_EDF, tile_expert = saved
    experts = w_EDF.shape[0]
    dx_XD = _run("product", implementation, dy_XF, w_EDF, tile_expert, transposed=True)
    dw_EDF = _run("weight_gradient", implementation, x_XD, dy_XF, tile_expert, experts)
    no_gradient = np.zeros(tile_expert.shape, jax.dtypes.float0)
    return dx_XD, dw_EDF.astype(w_EDF.dtype), no_gradient


_differentiable.defvjp(_forward, _backward)


def _run(function, implementation, *arguments, **keywords):
    return choose.run(__name__, function, implementation, *arguments, known=KNOWN, **keywords)


def grouped_fp8_matmul(
    x_XK: Tiled,
    w_ENK: Tiled,
    tile_expert: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """`grouped_matmul` of operands in FP8, x @ w^T. Differentiable: `pallas_kernels.fp8_linear`.

    Args:
        x_XK: rows in tiles of 1x128.
        w_ENK: one weight a group, in blocks of 128x128.
        tile_expert: as in `grouped_matmul`.
        out_dtype: float32 or bfloat16.
        implementation: as in `grouped_matmul`.

    Returns:
        [X, N]; summed in float32 every 128 of the contraction.

    Raises:
        ValueError: as `grouped_matmul`, and for scales that do not go with their numbers.
    """
    _block(x_XK.q.shape[0], tile_expert)
    (rows, width), (experts, cols, other) = x_XK.q.shape, w_ENK.q.shape
    if width != other:
        raise ValueError(f"rows of width {width} against weights of shape {w_ENK.q.shape}")
    _check_scales(x_XK, (rows, tiles(width)))
    _check_scales(w_ENK, (experts, tiles(cols), tiles(width)))
    return _run("fp8_product", implementation, x_XK, w_ENK, tile_expert, out_dtype)


def grouped_fp8_weight_gradient(
    x_DX: Tiled,
    dy_FX: Tiled,
    tile_expert: jax.Array,
    num_experts: int,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Sums x dy^T over the rows of each group, both in tiles of 1x128 along the rows.

    Args:
        x_DX: the product's rows, transposed.
        dy_FX: the gradient of its result, transposed.
        tile_expert: as in `grouped_matmul`; a tile has a multiple of 128 rows, so that no scale is
            shared by two groups.
        num_experts: E.
        implementation: as in `grouped_matmul`.

    Returns:
        float32 [E, D, F]; zeros for a group without rows.

    Raises:
        ValueError: as `grouped_fp8_matmul`, and for other tiles.
    """
    block = _block(x_DX.q.shape[1], tile_expert)
    if block % TILE:
        raise ValueError(f"tiles of {block} rows; scales are shared by {TILE}")
    if x_DX.q.shape[1] != dy_FX.q.shape[1]:
        raise ValueError(f"contracts {x_DX.q.shape[1]} rows with {dy_FX.q.shape[1]}")
    for operand in (x_DX, dy_FX):
        _check_scales(operand, (operand.q.shape[0], tiles(operand.q.shape[1])))
    return _run("fp8_weight_gradient", implementation, x_DX, dy_FX, tile_expert, num_experts)


def _block(rows, tile_expert):
    (count,) = tile_expert.shape
    if count == 0 or rows % count:
        raise ValueError(f"{rows} rows do not divide into {count} tiles")
    return rows // count


def _check_scales(x, wanted):
    if x.scale.shape != wanted:
        raise ValueError(f"{x.scale.shape} scales for {x.q.shape}, not {wanted}")
