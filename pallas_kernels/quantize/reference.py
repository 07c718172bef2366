"""The definition of `quantize` and of what is fused with it, in plain `jnp`; fast on CPU."""

import jax
import jax.numpy as jnp

from pallas_kernels.tiled import LARGEST, TILE, ScaleFormat, Tiled, tiles


def quantize(x_MK: jax.Array, tile: tuple[int, int], scale: ScaleFormat, orientation: str) -> Tiled:
    """See the package for arguments."""
    if orientation == "transposed":
        x_MK = jnp.swapaxes(x_MK, -1, -2)
    *lead, rows, cols = x_MK.shape
    height, width = tile
    m, k = -(-rows // height), tiles(cols)
    edges = [(0, 0)] * len(lead) + [(0, m * height - rows), (0, k * width - cols)]
    x = jnp.pad(x_MK.astype(jnp.float32), edges).reshape(*lead, m, height, k, width)
    amax = jnp.max(jnp.abs(x), axis=(-3, -1))
    scales = choose_scale(amax, scale)
    q = jnp.clip(x / scales[..., :, None, :, None], -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
    q = q.reshape(*lead, m * height, k * width)[..., :rows, :cols]
    return Tiled(q, scales)


def quantize_both(
    x_MK: jax.Array, tile: tuple[int, int], scale: ScaleFormat
) -> tuple[Tiled, Tiled]:
    """See the package for arguments."""
    return quantize(x_MK, tile, scale, "as_is"), quantize(x_MK, tile, scale, "transposed")


def choose_scale(amax: jax.Array, scale: ScaleFormat) -> jax.Array:
    """The scales of tiles whose largest magnitudes are given, float32."""
    scales = jnp.where(amax == 0, 1.0, jnp.maximum(amax / LARGEST, 2.0**-126))
    if scale == "power_of_two":
        bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
        # One up in the exponent unless the fraction is zero.
        bits = (bits + jnp.uint32(0x007FFFFF)) & jnp.uint32(0xFF800000)
        scales = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isfinite(amax), scales, jnp.nan)


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
    x = x_MD.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    normed = x * jax.lax.rsqrt(mean_square + eps) * scale_D.astype(jnp.float32)
    normed_MD = normed.astype(x_MD.dtype)
    return normed_MD, *quantize_both(normed_MD, (1, TILE), scale)
