"""Products of FP8 matrices with a scale for every tile, summed in float32 every 128.

What tensor cores sum of FP8 keeps too few bits for a whole contraction: each 128 of it are brought
to float32 and scaled there (DeepSeek-V3 report, section 3.3.2).

M rows, N columns, K contracted.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import choose
from pallas_kernels.tiled import Tiled, tiles

KNOWN = ("reference", "hopper", "tpu", "xla")


def fp8_matmul(
    a_MK: Tiled,
    b_NK: Tiled,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies a with b^T, both along what is contracted, as Hopper's tensor cores read FP8.

    Args:
        a_MK: in tiles of 1x128.
        b_NK: in blocks of 128x128 (weights), or in tiles of 1x128 (for the gradient of weights).
        out_dtype: float32 or bfloat16.
        implementation: "hopper", "tpu", "xla", "reference", or None, which takes the best one for
            the target.

    Returns:
        [M, N].

    Raises:
        ValueError: if shapes or scales do not go together, or the implementation is unknown.
    """
    (rows, width), (cols, other) = a_MK.q.shape, b_NK.q.shape
    if width != other:
        raise ValueError(f"contracts {width} with {other}")
    if a_MK.scale.shape != (rows, tiles(width)):
        raise ValueError(f"{a_MK.scale.shape} scales for {a_MK.q.shape} in tiles of 1x128")
    if b_NK.scale.shape not in ((cols, tiles(width)), (tiles(cols), tiles(width))):
        raise ValueError(
            f"{b_NK.scale.shape} scales for {b_NK.q.shape} in tiles of 1x128 or 128x128"
        )
    return choose.run(__name__, "fp8_matmul", implementation, a_MK, b_NK, out_dtype, known=KNOWN)
