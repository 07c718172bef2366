"""Causal attention over packed documents: MLA's expanded form, and grouped-query attention.

Knows nothing about latents or projections. B sequences of S rows, T queries that are some or all of
the rows, N heads, I key/value heads (all N of them in MLA), A key width, H value width.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import choose, e5m6
from pallas_kernels.varying import alike

KNOWN = ("reference", "hopper", "tokamax", "tpu", "xla")


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
        scale: multiplies the scores; a Python number.
        first_row: the queries are those of rows first_row .. first_row + T - 1. An int32 scalar
            that may be traced, and differ by device inside `shard_map`. T divides S, and it is a
            multiple of T below S; that is not checked of an array, whose other values give wrong
            outputs. None: the queries are those of every row, T = S.
        kept: how the result is kept for the backward pass: in the values' dtype, or in twelve bits
            (`pallas_kernels.e5m6`), to which it is then rounded (DeepSeek-V3 report, 3.3.3).
        implementation: "hopper", "tpu", "tokamax" (where it is installed), "xla" (blocks with an
            online softmax), all of memory linear in S; "reference" (builds [T, S]), or None, which
            takes the best one for the target.

    Returns:
        [B, T, N, H] in the values' dtype; padding rows are zero. Softmax in float32.

    Raises:
        ValueError: for heads that do not divide, rows that do not fit each other, or an
            implementation that is unknown or (`choose.Uncovered`) does not take them.
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
    if kept not in ("as_is", "e5m6"):
        raise ValueError(f"unknown kept {kept!r}; known: as_is, e5m6")
    arrays = q_BTNA, k_BSIA, v_BSIH, segments_BS, positions_BS
    if implementation == "reference":
        out_BTNH = _run("mla_attention", implementation, *arrays, scale, first_row)
        return e5m6.rounded(out_BTNH) if kept == "e5m6" else out_BTNH
    if first_row is not None:
        first_row = jnp.asarray(first_row, jnp.int32)
    return _attend(*alike((*arrays, first_row)), scale, kept, implementation)


_run = functools.partial(choose.run, __name__, known=KNOWN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _attend(q, k, v, segments, positions, first_row, scale, kept, implementation):
    """Attention by an implementation's `forward`, which returns the log-sum-exps [B, T, N], too."""
    ids = segments, positions
    out_BTNH, _ = _run("forward", implementation, q, k, v, *ids, scale, first_row)
    return e5m6.rounded(out_BTNH) if kept == "e5m6" else out_BTNH


def _forward(q, k, v, segments, positions, first_row, scale, kept, implementation):
    ids = segments, positions
    out_BTNH, lse_BTN = _run("forward", implementation, q, k, v, *ids, scale, first_row)
    # By these names a remat policy keeps what attention has found, and not its inputs.
    lse_BTN = checkpoint_name(lse_BTN, "attention_lse")
    held = e5m6.pack(out_BTNH) if kept == "e5m6" else out_BTNH
    held = jax.tree.map(lambda part: checkpoint_name(part, "attention_out"), held)
    # What comes after sees what is kept, so that nothing else of it need be.
    out_BTNH = e5m6.unpack(held, v.shape[-1], v.dtype) if kept == "e5m6" else held
    return out_BTNH, (q, k, v, segments, positions, first_row, held, lse_BTN)


def _backward(scale, kept, implementation, saved, d_out_BTNH):
    q, k, v, segments, positions, first_row, held, lse_BTN = saved
    out_BTNH = e5m6.unpack(held, v.shape[-1], v.dtype) if kept == "e5m6" else held
    inputs = q, k, v, segments, positions, scale, first_row
    gradients = _run("backward", implementation, *inputs, out_BTNH, lse_BTN, d_out_BTNH)
    no_gradient = np.zeros(segments.shape, jax.dtypes.float0)
    of_row = None if first_row is None else np.zeros((), jax.dtypes.float0)
    return *gradients, no_gradient, no_gradient, of_row


_attend.defvjp(_forward, _backward)
