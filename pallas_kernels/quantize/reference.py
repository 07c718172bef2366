"""The definition of `quantize` and of what is fused with it, in plain `jnp`; fast on CPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import exact
from pallas_kernels.tiled import LARGEST, TILE, ScaleFormat, Tiled, tiles

SMALLEST_NORMAL = 2.0**-126  # of float32; hardware may read what is below as zero
# Of all scales: under it what is below rounds to an FP8 zero anyway, and every FP8 number times it
# is normal.
SMALLEST_SCALE = 2.0**-116


def quantize(x_MK: jax.Array, tile: tuple[int, int], scale: ScaleFormat, orientation: str) -> Tiled:
    """See the package for arguments."""
    if orientation == "transposed":
        x_MK = jnp.swapaxes(x_MK, -1, -2)
    *lead, rows, cols = x_MK.shape
    height, width = tile
    m, k = -(-rows // height), tiles(cols)
    edges = [(0, 0)] * len(lead) + [(0, m * height - rows), (0, k * width - cols)]
    x = jnp.pad(x_MK.astype(jnp.float32), edges).reshape(*lead, m, height, k, width)
    scales = choose_scale(exact.as_float(magnitude_bits(x, (-3, -1))), scale)
    q = round_to_fp8(x, scales[..., :, None, :, None])
    q = q.reshape(*lead, m * height, k * width)[..., :rows, :cols]
    return Tiled(q, scales)


def quantize_both(
    x_MK: jax.Array, tile: tuple[int, int], scale: ScaleFormat
) -> tuple[Tiled, Tiled]:
    """See the package for arguments."""
    return quantize(x_MK, tile, scale, "as_is"), quantize(x_MK, tile, scale, "transposed")


def magnitude_bits(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """The bits, int32, of the largest magnitude of float32 numbers along axes; NaN's if one is."""
    # Of integers: magnitudes keep their order, and NaN comes last. A maximum of floats along axes
    # drops NaN on CPU, and as an instruction of most GPUs.
    return jnp.max(exact.as_bits(x) & 0x7FFFFFFF, axis=axes)


def choose_scale(amax: jax.Array, scale: ScaleFormat) -> jax.Array:
    """The scales of tiles whose largest magnitudes are given, float32."""
    # Not `amax == 0`: whether hardware flushes subnormal numbers must not matter.
    is_zero = amax < SMALLEST_NORMAL
    scales = jnp.where(is_zero, 1.0, jnp.maximum(exact.over_448(amax), SMALLEST_SCALE))
    if scale == "power_of_two":
        # One up in the exponent unless the fraction is zero.
        up = exact.as_bits(scales) + exact.SIGNIFICAND
        scales = exact.as_float(up & exact.EXPONENT)
    return jnp.where(amax < jnp.inf, scales, jnp.nan)


def round_to_fp8(x: jax.Array, scales: jax.Array) -> jax.Array:
    """Float32 numbers in FP8 under scales that broadcast: to the nearest, ties to even."""
    # The divisor must not look like a broadcast: XLA would multiply with reciprocals. (Where a
    # number is NaN its scale is, too.)
    divisor = jnp.where(jnp.isnan(x), x, scales)
    return jnp.clip(x / divisor, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)


def swiglu(gate_up_X2F: jax.Array, gates_X: jax.Array | None) -> jax.Array:
    """SwiGLU with a number a row, [X, F]."""
    gate, up = jnp.split(gate_up_X2F, 2, axis=-1)
    hidden_XF = (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(gate.dtype)
    return hidden_XF if gates_X is None else hidden_XF * gates_X[:, None].astype(hidden_XF.dtype)


def swiglu_quantize(
    gate_up_X2F: jax.Array, gates_X: jax.Array | None, scale: ScaleFormat, orientation: str
) -> Tiled:
    """See the package for arguments."""
    return quantize(swiglu(gate_up_X2F, gates_X), (1, TILE), scale, orientation)


def rms_norm_quantize(
    x_MD: jax.Array, scale_D: jax.Array, eps: float, scale: ScaleFormat
) -> tuple[jax.Array, Tiled, Tiled]:
    """See the package for arguments."""
    normed_MD = rms_norm(x_MD, scale_D, eps)
    return normed_MD, *quantize_both(normed_MD, (1, TILE), scale)


def rms_norm(x_MD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """Rows over their root mean square, times a number a column; float32 inside."""
    x = x_MD.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    normed = x * jax.lax.rsqrt(mean_square + eps) * scale_D.astype(jnp.float32)
    return normed.astype(x_MD.dtype)
