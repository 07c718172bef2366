"""Twelve bits a number: five of exponent, six of fraction, with a power-of-two scale a tile.

DeepSeek-V3 keeps the output of attention so for the backward pass, where FP8 would be too coarse
(report, section 3.3.3). Knows nothing about attention. K numbers along the last dimension.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tiled import TILE


class Packed(NamedTuple):
    """Numbers of twelve bits, two in three bytes.

    Attributes:
        bits: uint8 [..., 3, K / 2 rounded up]: the high bytes of the first half of the numbers, the
            high bytes of the second half, the low four bits of both.
        exponent: int8 [..., tiles of 128 along K], of the scales.
    """

    bits: jax.Array
    exponent: jax.Array


def pack(x_K: jax.Array) -> Packed:
    """Rounds [..., K] to the nearest, ties to even; what is not finite makes its tile NaN.

    The scale brings a tile's largest magnitude into [2^8, 2^9), so that numbers down to 2^-22 of it
    keep all bits; smaller ones become zero.
    """
    *lead, width = x_K.shape
    tiles = -(-width // TILE)
    x = jnp.pad(x_K.astype(jnp.float32), [(0, 0)] * len(lead) + [(0, tiles * TILE - width)])
    x = x.reshape(*lead, tiles, TILE)
    amax = jnp.max(jnp.abs(x), axis=-1)
    biased = (jax.lax.bitcast_convert_type(amax, jnp.int32) >> 23) & 0xFF
    exponent = jnp.clip(biased - 127 - 8, -126, 119)
    scaled = x * _power(-exponent)[..., None]
    scaled = jnp.where(jnp.isfinite(amax)[..., None], scaled, jnp.nan)
    rounded = jax.lax.reduce_precision(scaled, exponent_bits=5, mantissa_bits=6)
    rounded = rounded.reshape(*lead, tiles * TILE)[..., :width]
    rounded = jnp.pad(rounded, [(0, 0)] * len(lead) + [(0, width % 2)])
    half = jax.lax.bitcast_convert_type(rounded.astype(jnp.float16), jnp.uint16) >> 4
    first, second = jnp.split(half, 2, axis=-1)
    low = ((first & 15) << 4) | (second & 15)
    bits = jnp.stack([first >> 4, second >> 4, low], axis=-2).astype(jnp.uint8)
    return Packed(bits, exponent.astype(jnp.int8))


def unpack(packed: Packed, width: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """[..., K] of the given width."""
    first, second, low = (packed.bits[..., i, :].astype(jnp.uint16) for i in range(3))
    half = jnp.concatenate([(first << 4) | (low >> 4), (second << 4) | (low & 15)], axis=-1)
    x = jax.lax.bitcast_convert_type(half << 4, jnp.float16)[..., :width].astype(jnp.float32)
    scale = jnp.repeat(_power(packed.exponent.astype(jnp.int32)), TILE, axis=-1)
    return (x * scale[..., :width]).astype(dtype)


def rounded(x_K: jax.Array) -> jax.Array:
    """What comes back, in the same dtype."""
    return unpack(pack(x_K), x_K.shape[-1], x_K.dtype)


def _power(exponent):
    """2 ** exponent as float32, exactly; from -126 to 127."""
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
