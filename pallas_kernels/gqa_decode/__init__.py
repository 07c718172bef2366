"""Attention of new positions over paged keys and values: grouped-query decoding.

Knows nothing about projections. B sequences, T new positions each, N heads, I key/value heads,
A key and H value width, L layers, X pages of S positions.
"""

import jax

from pallas_kernels.gqa_decode import reference, xla


def gqa_decode(
    q_BTNA: jax.Array,
    k_LXSIA: jax.Array,
    v_LXSIH: jax.Array,
    layer: jax.Array,
    table_BX: jax.Array,
    length_B: jax.Array,
    positions_BT: jax.Array,
    scale: float,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends to the cached positions of the same sequence that are not later.

    Args:
        q_BTNA: rotated queries; I divides N, and query head n sees key head n // (N / I).
        k_LXSIA: the whole cache of rotated keys.
        v_LXSIH: the whole cache of values.
        layer: int32 scalar, which layer to read.
        table_BX: int32 pages of each sequence in order; entries past the length are never read
            for their value, but must be valid page numbers.
        length_B: int32 positions cached, this call's included.
        positions_BT: int32 position of each query; a negative one attends to nothing.
        scale: multiplies the scores.
        implementation: "xla" (a loop over pages in use, online softmax), "reference" (gathers
            every page), or None, which takes the best one known for the backend.

    Returns:
        (out [B, T, N, H] in the queries' dtype, log-sum-exp [B, T, N] float32). A query that
        attends to nothing gives zero and -1e30.

    Raises:
        ValueError: for an unknown implementation, or heads that do not divide.
    """
    n, i = q_BTNA.shape[2], k_LXSIA.shape[3]
    if n % i != 0 or v_LXSIH.shape[3] != i:
        raise ValueError(f"{n} query heads, {i} of keys and {v_LXSIH.shape[3]} of values")
    arguments = (q_BTNA, k_LXSIA, v_LXSIH, layer, table_BX, length_B, positions_BT, scale)
    match implementation:
        case "xla" | None:
            return xla.gqa_decode(*arguments)
        case "reference":
            return reference.gqa_decode(*arguments)
    raise ValueError(f"unknown implementation {implementation!r}; known: xla, reference")
