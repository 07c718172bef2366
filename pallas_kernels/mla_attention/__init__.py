"""Causal attention over packed documents: MLA's expanded form, and grouped-query attention.

Knows nothing about latents or projections. B sequences of S rows, T queries that are some or all of
the rows, N heads, I key/value heads (all N of them in MLA), A key width, H value width.
"""

from typing import Literal

import jax
import numpy as np

from pallas_kernels.e5m6 import rounded
from pallas_kernels.mla_attention import reference, xla


def mla_attention(
    q_BTNA: jax.Array,
    k_BSIA: jax.Array,
    v_BSIH: jax.Array,
    segments_BS: jax.Array,
    positions_BS: jax.Array,
    scale: float,
    *,
    first_row: jax.Array | int | None = None,
    kept: Literal["as_is", "e5m6"] = "as_is",
    implementation: str | None = None,
) -> jax.Array:
    """Attends to the positions of the same segment that are not later.

    Args:
        q_BTNA: queries.
        k_BSIA: keys; I divides N, and query head n sees key head n // (N / I). They are never
            repeated.
        v_BSIH: values, wider or narrower than keys.
        segments_BS: int32; each document is one contiguous run of a number of its own in its row,
            0 is padding.
        positions_BS: int32, rising along the row inside a segment.
        scale: multiplies the scores.
        first_row: the queries are those of rows first_row .. first_row + T - 1. An int32 scalar
            that may be traced, and differ by device inside `shard_map`. T divides S, and it is a
            multiple of T below S; that is not checked of an array, whose other values give wrong
            outputs. None: the queries are those of every row, T = S.
        kept: how the result is kept for the backward pass: in the values' dtype, or in twelve bits
            (`pallas_kernels.e5m6`), to which it is then rounded (DeepSeek-V3 report, 3.3.3).
        implementation: "xla" (blocks with an online softmax, memory linear in S), "reference"
            (builds [T, S]), or None, which takes the best one known for the backend.

    Returns:
        [B, T, N, H] in the values' dtype; padding rows are zero. Softmax in float32.

    Raises:
        ValueError: for an unknown implementation, heads that do not divide, or rows that do not
            fit each other.
    """
    (_, t, n, _), (_, s, i, _) = q_BTNA.shape, k_BSIA.shape
    if n % i != 0 or v_BSIH.shape[2] != i:
        raise ValueError(f"{n} query heads, {i} of keys and {v_BSIH.shape[2]} of values")
    others = v_BSIH.shape[1], segments_BS.shape[1], positions_BS.shape[1]
    if any(rows != s for rows in others):
        raise ValueError(
            "{} rows of keys, {} of values, {} segments, {} positions".format(s, *others)
        )
    if first_row is None and t != s:
        raise ValueError(f"{t} queries of {s} rows need first_row")
    if first_row is not None and s % t != 0:
        raise ValueError(f"{s} rows do not divide into parts of {t} queries")
    if isinstance(first_row, int | np.integer) and (first_row % t != 0 or not 0 <= first_row < s):
        raise ValueError(f"first_row {first_row} is not a multiple of {t} below {s}")
    arguments = q_BTNA, k_BSIA, v_BSIH, segments_BS, positions_BS, scale, first_row
    if kept not in ("as_is", "e5m6"):
        raise ValueError(f"unknown kept {kept!r}; known: as_is, e5m6")
    match implementation:
        case "xla" | None:
            return xla.mla_attention(*arguments, kept=kept)
        case "reference":
            out_BTNH = reference.mla_attention(*arguments)
            return rounded(out_BTNH) if kept == "e5m6" else out_BTNH
    raise ValueError(f"unknown implementation {implementation!r}; known: xla, reference")
