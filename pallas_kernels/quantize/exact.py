"""Quotients rounded as IEEE 754 rounds them, from products and sums alone.

The division of GPUs and TPUs, as XLA and Pallas issue it, is off by up to two units in the last
place; FP8 bytes would depend on the hardware, and BF16 inputs meet ties often. XLA moreover turns
a division by a constant into a product with its reciprocal. Knows nothing about tiles.

Products of parts have at most 24 bits, so that it does not matter whether a compiler fuses them
with the sum that follows; but for the last one of `divide`. Fused, as GPU compilers do, it errs
nowhere; if not, in one of 671 million pairs, a number over 1.625 - 2^-23.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SIGNIFICAND = 0x007FFFFF  # the bits of a float32 below its exponent
EXPONENT = 0x7F800000
ONE = 0x3F800000  # 1.0
HALF = 0x3F000000  # 0.5


class Divisor(NamedTuple):
    """A positive float32 s = significand * 2^e, significand in [1, 2), as `divide` needs it.

    Attributes:
        power: 2^-e.
        high: the first 12 bits of the significand.
        low: its other 12.
        reciprocal: of the significand, rounded to the nearest.
    """

    power: jax.Array
    high: jax.Array
    low: jax.Array
    reciprocal: jax.Array


def over_448(x: jax.Array) -> jax.Array:
    """Divides normal, positive float32 by 448, where the result is normal too."""
    bits = as_bits(x)
    significand = as_float(bits & SIGNIFICAND | ONE)
    near = as_float(as_bits(significand * (1 / 7)) & ~0x7)
    excess = near * 7 - significand
    return (near - excess * (1 / 7)) * as_float(bits & EXPONENT) * 2.0**-6


def divisor(s: jax.Array) -> Divisor:
    """Prepares a division by s, between 2^-126 and 2^126, or NaN.

    NaN becomes the power -inf, and whatever is divided by it NaN.
    """
    bits = as_bits(s)
    power = as_float((254 << 23) - (bits & EXPONENT))
    significand = as_float(bits & SIGNIFICAND | ONE)
    high = as_float(as_bits(significand) & ~0xFFF)
    return Divisor(power, high, significand - high, _reciprocal(significand))


def _reciprocal(significand: jax.Array) -> jax.Array:
    """1 / significand of [1, 2), to the nearest, from a division that is off by two units."""
    bits = as_bits(_one_over(significand))
    whole = as_bits(significand) & SIGNIFICAND | 0x00800000
    for _ in range(2):
        # Both are integers of 24 bits here. Their product should be 2^47, and it is so near that
        # the difference can be told from its last 32 bits.
        missing = -(whole * (bits - HALF + 0x00800000))
        up = (2 * missing > whole).astype(jnp.int32)
        down = (2 * missing < -whole).astype(jnp.int32)
        bits = bits + up - down
    return as_float(bits)


def _one_over(significand: jax.Array) -> jax.Array:
    return 1.0 / significand


def divide(x: jax.Array, by: Divisor) -> jax.Array:
    """Divides x by s: near enough that e4m3 of it is e4m3 of the float32 quotient.

    Exact for the numbers next to a tie of e4m3, which alone matter: there the first 12 bits of the
    quotient are the tie, and what is left over is exact.
    """
    x = x * by.power
    first = as_float((as_bits(x * by.reciprocal) + 0x800) & ~0xFFF)
    # In this order zeros keep their signs.
    excess = (first * by.high - x) + first * by.low
    return first - excess * by.reciprocal


def as_bits(x: jax.Array) -> jax.Array:
    """The bits of float32 as int32; of positive numbers in their order."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def as_float(bits: jax.Array) -> jax.Array:
    """The float32 of some bits."""
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
