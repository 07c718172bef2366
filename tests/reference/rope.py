"""Rotary frequencies, plain or stretched, rotation of interleaved pairs, softmax scale."""

import math

import numpy as np


def rope_frequencies(rope_dim, theta):
    """Radians a position for each pair: theta^(-2i / R).

    Source: Su et al. 2021 (arXiv 2104.09864), section 3.2.2; YaRN section 2.1.
    """
    return np.array([theta ** (-2.0 * i / rope_dim) for i in range(rope_dim // 2)])


def yarn_mscale(factor, mscale=1.0):
    """0.1 * mscale * ln(factor) + 1; 1 where the context is not extended.

    Source: YaRN section 3.4 (sqrt(1/t) = 0.1 ln(s) + 1); `mscale` is DeepSeek's coefficient
    (V2 section 3.1.4: 0.0707 ln(s) + 1).
    """
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def yarn_ramp(rope_dim, theta, original_max_positions, beta_fast=32.0, beta_slow=1.0):
    """How far each pair is interpolated: 0 for more than beta_fast turns, 1 for under beta_slow.

    Source: YaRN section 3.2, Definition 2.
    """

    def pair_that_turns(turns):
        """The (fractional) pair that makes `turns` turns over the original context."""
        wavelength = original_max_positions / turns
        return rope_dim * math.log(wavelength / (2.0 * math.pi)) / (2.0 * math.log(theta))

    # Differs from the paper: its ramp is linear in turns; YaRN's and DeepSeek's code, and so the
    # published models, have it linear in the pair's index, between whole indices.
    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), rope_dim - 1)
    width = high - low if high != low else 0.001
    return np.array([min(max((i - low) / width, 0.0), 1.0) for i in range(rope_dim // 2)])


def yarn_frequencies(
    rope_dim, theta, *, factor, original_max_positions, beta_fast=32.0, beta_slow=1.0
):
    """Frequencies by NTK-by-parts: fast pairs unchanged, slow ones divided by `factor`.

    Source: YaRN section 3.2, Definition 2: h = (1 - gamma) freq / s + gamma freq, gamma = 1 - ramp.
    """
    frequencies_r = rope_frequencies(rope_dim, theta)
    ramp_r = yarn_ramp(rope_dim, theta, original_max_positions, beta_fast, beta_slow)
    for i in range(rope_dim // 2):
        interpolated = frequencies_r[i] / factor
        frequencies_r[i] = ramp_r[i] * interpolated + (1.0 - ramp_r[i]) * frequencies_r[i]
    return frequencies_r


def llama3_frequencies(
    rope_dim, theta, *, factor, original_max_positions, low_freq_factor, high_freq_factor
):
    """Long waves divided by `factor`, short ones kept, those between on a line in 1 / wavelength.

    Source: Llama 3.1's published code (`apply_scaling`), the branches in its order.
    """
    scaled_r = []
    for frequency in rope_frequencies(rope_dim, theta):
        wavelength = 2 * math.pi / frequency
        if wavelength < original_max_positions / high_freq_factor:
            scaled_r.append(frequency)
        elif wavelength > original_max_positions / low_freq_factor:
            scaled_r.append(frequency / factor)
        else:
            smooth = original_max_positions / wavelength - low_freq_factor
            smooth /= high_freq_factor - low_freq_factor
            scaled_r.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(scaled_r)


def frequencies_and_magnitude(rope_dim, rope):
    """(frequencies_r, factor on cos and sin) for `rope` with fields `theta` and `yarn`.

    It may have `llama3` or `linear_factor` instead of `yarn`.
    Source: DeepSeek's published modelling code: cos and sin times m(mscale) / m(mscale_all_dim).
    """
    yarn, llama3 = rope.yarn, getattr(rope, "llama3", None)
    if llama3 is not None:
        settings = {
            "factor": llama3.factor,
            "original_max_positions": llama3.original_max_positions,
            "low_freq_factor": llama3.low_freq_factor,
            "high_freq_factor": llama3.high_freq_factor,
        }
        return llama3_frequencies(rope_dim, rope.theta, **settings), 1.0
    if yarn is None:
        return rope_frequencies(rope_dim, rope.theta) / getattr(rope, "linear_factor", 1.0), 1.0
    frequencies_r = yarn_frequencies(
        rope_dim,
        rope.theta,
        factor=yarn.factor,
        original_max_positions=yarn.original_max_positions,
        beta_fast=yarn.beta_fast,
        beta_slow=yarn.beta_slow,
    )
    above = yarn_mscale(yarn.factor, yarn.mscale)
    below = yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return frequencies_r, above / below


def softmax_scale(head_dim, yarn=None):
    """1 / sqrt(P + R), times m(mscale_all_dim)^2 with YaRN.

    Source: V3 eq. 10; YaRN section 3.4 (1/t on the logits, that is m on both q and k).
    """
    scale = 1.0 / math.sqrt(head_dim)
    return scale if yarn is None else scale * yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def apply_rope(x_R, position, frequencies_r, magnitude=1.0):
    """Rotates the pairs (x[2i], x[2i + 1]) of one vector by position * frequency[i].

    Source: Su et al. 2021, eq. 15 (interleaved pairs).
    """
    out_R = np.zeros(len(x_R))
    for i, frequency in enumerate(frequencies_r):
        cos = math.cos(position * frequency) * magnitude
        sin = math.sin(position * frequency) * magnitude
        out_R[2 * i] = x_R[2 * i] * cos - x_R[2 * i + 1] * sin
        out_R[2 * i + 1] = x_R[2 * i] * sin + x_R[2 * i + 1] * cos
    return out_R
