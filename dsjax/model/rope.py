"""Rotary position embedding on interleaved pairs, and how it is stretched over longer contexts.

Knows nothing about attention. R rope width, B sequences, T positions.
Sources: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); DeepSeek-V2 report, 2.1.3 and 3.1.4;
position interpolation (arXiv 2306.15595); Llama 3.1's published code.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from dsjax.config import Llama3RopeConfig, RopeConfig, YarnConfig

Rotation = tuple[Float[Array, "B T R2"], Float[Array, "B T R2"]]  # cos and sin, float32; R / 2


def yarn_mscale(factor: float, mscale: float) -> float:
    """Returns 0.1 * mscale * ln(factor) + 1, YaRN's attention temperature; 1 for no extension."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def frequencies(rope_dim: int, config: RopeConfig) -> Float64[np.ndarray, " R2"]:
    """Radians a position for each pair of the rope dimensions.

    With YaRN, pairs that turn more than `beta_fast` times within the original context keep their
    frequency, those below `beta_slow` turns are divided by `factor`, and a linear ramp over the
    pair's index lies between (YaRN paper, section 3.2). Llama 3's ramp is linear in turns instead.
    Position interpolation divides every frequency.

    Returns:
        float64 [R / 2], fastest first.
    """
    inverse = config.theta ** (-np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim)
    inverse = inverse / config.linear_factor
    yarn = config.yarn
    if config.llama3 is not None:
        return _llama3(inverse, config.llama3)
    if yarn is None:
        return inverse

    def pair_turning(turns: float) -> float:
        wavelength = yarn.original_max_positions / (turns * 2 * math.pi)
        return rope_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low = max(math.floor(pair_turning(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_turning(yarn.beta_slow)), rope_dim - 1)
    width = high - low if high != low else 0.001  # as published: no division by zero
    ramp = np.clip((np.arange(rope_dim // 2) - low) / width, 0.0, 1.0)
    return inverse / yarn.factor * ramp + inverse * (1.0 - ramp)


def _llama3(inverse: np.ndarray, config: Llama3RopeConfig) -> np.ndarray:
    """Frequencies by how often a pair turns within the original context."""
    turns = config.original_max_positions * inverse / (2 * math.pi)
    kept = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return inverse / config.factor * (1.0 - kept) + inverse * kept


def rotation(positions_BT: Int[Array, "B T"], rope_dim: int, config: RopeConfig) -> Rotation:
    """Cosines and sines of each position's angles, float32 [B, T, R / 2].

    With YaRN both are scaled by m(mscale) / m(mscale_all_dim), which is 1 where the two are equal.
    """
    angles = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(
        frequencies(rope_dim, config), jnp.float32
    )
    scale = 1.0
    if config.yarn is not None:
        yarn = config.yarn
        scale = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(
            yarn.factor, yarn.mscale_all_dim
        )
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Float[Array, "B T *N R"], turn: Rotation) -> Float[Array, "B T *N R"]:
    """Turns the pairs (2i, 2i+1) of the last dimension.

    Args:
        x: [B, T, R] or [B, T, N, R].
        turn: `rotation`'s result.

    Numerics: float32 inside, result in x's dtype.
    """
    cos, sin = turn
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def softmax_scale(head_dim: int, yarn: YarnConfig | None) -> float:
    """Returns 1 / sqrt(A), times mscale squared with YaRN (mscale from `mscale_all_dim`)."""
    scale = head_dim**-0.5
    if yarn is not None:
        scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale
