"""FP8 weights in blocks of 128x128, as DeepSeek publishes them: to and from wider numbers.

Knows nothing about files or models. A matrix [R, C] has a scale for each block [r, c], r = R / 128
and c = C / 128 rounded up; blocks at the edges are smaller. Value = FP8 number times scale, in
float32. Source: V3 report, section 3.3; the published checkpoint and its `weight_scale_inv`.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from dsjax.errors import InputError
from dsjax.precision import BLOCK
from pallas_kernels.quantize.exact import as_float
from pallas_kernels.quantize.reference import SMALLEST_NORMAL, SMALLEST_SCALE, magnitude_bits

# How scales are kept: any float32; powers of two in float32, or as their exponents (V3.1).
ScaleFormat = Literal["float32", "power_of_two", "e8m0"]
SCALE_FORMATS: tuple[ScaleFormat, ...] = ("float32", "power_of_two", "e8m0")
LARGEST = float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)  # 448


def blocks(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a matrix's scales."""
    rows, cols = shape
    return -(-rows // BLOCK), -(-cols // BLOCK)


def check_scale(scale: Shaped[np.ndarray, "..."], where: str) -> Float[np.ndarray, "r c"]:
    """Scales in float32.

    Args:
        scale: as stored.
        where: file and tensor, for messages.

    Raises:
        InputError: if one is not a positive number.
    """
    scale = scale.astype(np.float32)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        wrong = scale[~(np.isfinite(scale) & (scale > 0))].flat[0]
        raise InputError(f"{where} holds the scale {wrong}; scales must be positive and finite")
    return scale


def choose_scale(
    amax: Float[np.ndarray, "r c"], scale_format: ScaleFormat
) -> Float[np.ndarray, "r c"]:
    """Scales that bring each block's largest magnitude to at most 448; 1 for a block of zeros.

    The same that training in FP8 finds (`pallas_kernels.quantize`), so that what is exported is
    what was computed with.
    """
    amax = np.where(amax < SMALLEST_NORMAL, np.float32(LARGEST), amax).astype(np.float32)
    scale = np.maximum(amax / np.float32(LARGEST), np.float32(SMALLEST_SCALE))
    if scale_format == "float32":
        return scale
    mantissa, exponent = np.frexp(scale)  # scale = mantissa * 2 ** exponent, mantissa in [1/2, 1)
    return np.ldexp(np.float32(1.0), np.where(mantissa == 0.5, exponent - 1, exponent))


def at_least(scale: Float[np.ndarray, "r c"], dtype: np.dtype) -> Float[np.ndarray, "r c"]:
    """The scales as a dtype holds them, rounded up where they must be: FP8 has no room above."""
    held = scale.astype(dtype)
    if dtype.itemsize == 2:
        held = np.where(held.astype(np.float32) < scale, held.view(np.uint16) + 1, held.view("u2"))
        held = held.astype(np.uint16).view(dtype)
    return held.astype(np.float32)


def check_range(scale: Float[np.ndarray, "r c"], q: Shaped[np.ndarray, "R C"], where: str) -> None:
    """Refuses scales under which float32 loses or overflows FP8's numbers.

    Raises:
        InputError: naming the scale; blocks of zeros may have any.
    """
    for i, j in np.argwhere((scale < 2.0**-117) | (scale > 2.0**119)):
        block = q[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
        if (block.view(np.uint8) & 0x7F).any():
            raise InputError(f"{where} has the scale {scale[i, j]}, which float32 cannot follow")


def is_power_of_two(scale: Float[np.ndarray, "r c"]) -> bool:
    """Whether every scale is one, so that its exponent says it all."""
    return bool((np.frexp(scale)[0] == 0.5).all())


def bits(x) -> Array:
    """FP8 as bytes, anything else as it is; traceable.

    XLA:CPU moves FP8 through a wider type: a slice of an array, or an update in place, then costs
    the whole array (measured: 300 ms where bytes take 1.7).
    """
    is_fp8 = x.dtype == jnp.float8_e4m3fn
    return jax.lax.bitcast_convert_type(x, jnp.uint8) if is_fp8 else jnp.asarray(x)


def from_bits(x, dtype) -> Array:
    """The inverse of `bits`."""
    is_fp8 = dtype == jnp.float8_e4m3fn
    return jax.lax.bitcast_convert_type(x, dtype) if is_fp8 else x


def _spread(scale, rows: int, cols: int, row: int = 0, col: int = 0):
    """Each element's scale for `rows` and `cols` from (row, col), both inside the first block."""
    r, c = scale.shape
    wide = jnp.broadcast_to(scale[:, None, :, None], (r, BLOCK, c, BLOCK))
    return wide.reshape(r * BLOCK, c * BLOCK)[row : row + rows, col : col + cols]


def decode(q, scale, row: int = 0, col: int = 0) -> Array:
    """FP8 and scales -> float32; traceable.

    Args:
        q: float8_e4m3fn [rows, cols], a part of a matrix.
        scale: float32 of the blocks that it touches.
        row: where it begins in the first of them.
        col: the same for columns.
    """
    rows, cols = q.shape
    return q.astype(jnp.float32) * _spread(scale, rows, cols, row, col)


@jax.jit
def encode(x: Float[Array, "R C"], scale: Float[Array, "r c"]) -> Shaped[Array, "R C"]:
    """Values -> FP8 under given scales, to the nearest, ties to even."""
    rows, cols = x.shape
    x = x.astype(jnp.float32)
    scaled = jnp.where(x == 0, x, x / _spread(scale, rows, cols))  # a scale may be flushed to zero
    return jnp.clip(scaled, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)


def _by_block(x, fill):
    rows, cols = x.shape
    r, c = blocks(x.shape)
    x = jnp.pad(x, ((0, r * BLOCK - rows), (0, c * BLOCK - cols)), constant_values=fill)
    return x.reshape(r, BLOCK, c, BLOCK)


@jax.jit
def amax(x: Float[Array, "R C"]) -> Float[Array, "r c"]:
    """The largest magnitude of each block; NaN where one is."""
    return as_float(magnitude_bits(_by_block(x.astype(jnp.float32), 0.0), (1, 3)))


@jax.jit
def kept_by(x: Float[Array, "R C"], scale: Float[Array, "r c"]) -> Bool[Array, "r c"]:
    """Which blocks come back bit for bit from FP8 under these scales."""
    back = decode(encode(x, scale), scale)
    return jnp.all(_by_block(back == x.astype(jnp.float32), True), axis=(1, 3))


@functools.partial(jax.jit, static_argnames="dtype")
def decoded(
    q: Shaped[Array, "R C"], scale: Float[Array, "r c"], dtype: str
) -> Shaped[Array, "R C"]:
    """FP8 and scales of whole blocks -> values in a dtype."""
    return decode(q, scale).astype(dtype)
