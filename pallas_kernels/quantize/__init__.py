"""Numbers to FP8 with a scale for every tile, alone and right after what makes the numbers.

Activations and gradients have a scale for 128 neighbours along what will be contracted, weights one
for a block of 128x128 (DeepSeek-V3 report, section 3.3.2). A scale is the tile's largest magnitude
over 448, or the next power of two, at least 2^-116; 1 for a tile of zeros, as which numbers below
2^-126 count. Numbers over the scale are rounded to the nearest, ties to even, as IEEE 754 does
both. A tile that holds NaN or infinity becomes NaN as a whole, its scale too: nothing computed from
it is finite, and a train step is not taken. Knows nothing about models.

M rows, K columns, X rows of a buffer, F hidden width, D model width.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import choose
from pallas_kernels.tiled import ScaleFormat, Tiled

Orientation = Literal["as_is", "transposed"]
KNOWN = ("hopper", "tpu", "reference")


def quantize(
    x_MK: jax.Array,
    *,
    tile: tuple[int, int] = (1, 128),
    scale: ScaleFormat = "float32",
    orientation: Orientation = "as_is",
    implementation: str | None = None,
) -> Tiled:
    """Brings a matrix, or matrices side by side, to FP8.

    Args:
        x_MK: [..., M, K], float32 or bfloat16; leading dimensions with `tile` (128, 128) alone.
        tile: (1, 128), along the last dimension of what is returned, or (128, 128).
        scale: any float32, or powers of two rounded up.
        orientation: whether x or its transpose is returned, which for tiles of 1x128 have other
            scales: along K for x, along M for its transpose.
        implementation: "hopper", "tpu", "reference" (plain JAX, fast on CPU), or None, which takes
            the best one for the target.

    Returns:
        The numbers, [..., M, K] or [..., K, M].

    Raises:
        ValueError: for another tile, scale, orientation or implementation, or for what a named
            implementation does not take.
    """
    _check(tile, scale, orientation)
    return _run("quantize", implementation, x_MK, tuple(tile), scale, orientation)


def quantize_both(
    x_MK: jax.Array,
    *,
    tile: tuple[int, int] = (1, 128),
    scale: ScaleFormat = "float32",
    implementation: str | None = None,
) -> tuple[Tiled, Tiled]:
    """`quantize` in both orientations, in one pass over x."""
    _check(tile, scale)
    return _run("quantize_both", implementation, x_MK, tuple(tile), scale)


def swiglu_quantize(
    gate_up_X2F: jax.Array,
    gates_X: jax.Array | None = None,
    *,
    scale: ScaleFormat = "float32",
    orientation: Orientation = "as_is",
    implementation: str | None = None,
) -> Tiled:
    """SiLU of the left half times the right half, times a number a row, to FP8 in tiles of 1x128.

    Args:
        gate_up_X2F: the projections, side by side.
        gates_X: the router's gates; None for 1.
        scale: as in `quantize`.
        orientation: [X, F] with scales along F, or [F, X] with scales along X.
        implementation: as in `quantize`.

    Returns:
        The hidden vectors; computed in float32, rounded to the dtype of `gate_up_X2F` before the
        gates are multiplied in it.
    """
    _check((1, 128), scale, orientation)
    return _run("swiglu_quantize", implementation, gate_up_X2F, gates_X, scale, orientation)


def rms_norm_quantize(
    x_MD: jax.Array,
    scale_D: jax.Array,
    eps: float,
    *,
    scale: ScaleFormat = "float32",
    implementation: str | None = None,
) -> tuple[jax.Array, Tiled, Tiled]:
    """RMSNorm, and its result in FP8 in both orientations.

    Args:
        x_MD: rows.
        scale_D: what each column is multiplied with.
        eps: added to the mean square.
        scale: as in `quantize`.
        implementation: as in `quantize`.

    Returns:
        (the normed rows in the dtype of `x_MD`, [M, D] with scales along D, [D, M] with scales
        along M); what is quantised is the first.
    """
    _check((1, 128), scale)
    return _run("rms_norm_quantize", implementation, x_MD, scale_D, eps, scale)


def _run(function, implementation, x, *arguments):
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{function} of {x.dtype}: floating numbers only")
    return choose.run(__name__, function, implementation, x, *arguments, known=KNOWN)


def _check(tile, scale, orientation="as_is"):
    if tuple(tile) not in ((1, 128), (128, 128)):
        raise ValueError(f"unknown tile {tile!r}; known: (1, 128), (128, 128)")
    if scale not in ("float32", "power_of_two"):
        raise ValueError(f"unknown scale {scale!r}; known: float32, power_of_two")
    if orientation not in ("as_is", "transposed"):
        raise ValueError(f"unknown orientation {orientation!r}; known: as_is, transposed")
