"""Causal attention over packed documents: MLA's expanded form, and grouped-query attention.

Knows nothing about latents or projections. B sequences, T queries = keys in row order, N heads,
I key/value heads (all N of them in MLA), A key width, H value width.
"""

import jax

from pallas_kernels.mla_attention import reference, xla


def mla_attention(
    q_BTNA: jax.Array,
    k_BTIA: jax.Array,
    v_BTIH: jax.Array,
    segments_BT: jax.Array,
    positions_BT: jax.Array,
    scale: float,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Attends to the positions of the same segment that are not later.

    Args:
        q_BTNA: queries.
        k_BTIA: keys; I divides N, and query head n sees key head n // (N / I). They are never
            repeated.
        v_BTIH: values, wider or narrower than keys.
        segments_BT: int32; each document is one contiguous run of a number of its own in its row,
            0 is padding.
        positions_BT: int32, rising along the row inside a segment.
        scale: multiplies the scores.
        implementation: "xla" (blocks with an online softmax, memory linear in T), "reference"
            (builds [T, T]), or None, which takes the best one known for the backend.

    Returns:
        [B, T, N, H] in the values' dtype; padding rows are zero. Softmax in float32.

    Raises:
        ValueError: for an unknown implementation, or heads that do not divide.
    """
    n, i = q_BTNA.shape[2], k_BTIA.shape[2]
    if n % i != 0 or v_BTIH.shape[2] != i:
        raise ValueError(f"{n} query heads, {i} of keys and {v_BTIH.shape[2]} of values")
    match implementation:
        case "xla" | None:
            return xla.mla_attention(q_BTNA, k_BTIA, v_BTIH, segments_BT, positions_BT, scale)
        case "reference":
            return reference.mla_attention(q_BTNA, k_BTIA, v_BTIH, segments_BT, positions_BT, scale)
    raise ValueError(f"unknown implementation {implementation!r}; known: xla, reference")
