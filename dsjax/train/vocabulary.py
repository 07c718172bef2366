"""What the head says of each target: cross entropies and log probabilities, a chunk at a time.

Knows nothing about what a target is worth. Logits of all tokens are never whole, nor is a head that
several devices store. Losses that weigh each token by a number known before take `cross_entropy`;
those that depend on its probability take `log_probs`.

U tokens, D width, V vocabulary, v the columns of it that a device stores.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.model.transformer import Transformer
from dsjax.precision import Precision
from sharding import island
from sharding.rules import Layout

# Logits a chunk: 32 MiB in float32, a few times a CPU's cache and enough to fill an accelerator.
CHUNK_LOGITS = 1 << 23


class Draw(NamedTuple):
    """The distribution that targets were drawn from.

    Attributes:
        temperature: divides logits.
        allowed: ids from here on were never drawn; None for no such.
    """

    temperature: float = 1.0
    allowed: int | None = None


class Told(NamedTuple):
    """What the head says of tokens, float32.

    Attributes:
        log_prob_U: of each target, nats.
        entropy_U: of the distribution that it was drawn from, nats; no gradient.
    """

    log_prob_U: Array
    entropy_U: Array


def mean_cross_entropy(
    model: Transformer,
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    denominator: Array | np.ndarray | np.floating | float,
) -> Float[Array, ""]:
    """Weighted sum of cross entropies over `denominator`, nats; on a mesh, of this device's tokens.

    Args:
        model: whose head it is.
        hidden_BTD: after the final norm.
        targets_BT: int32 next tokens.
        weights_BT: float32; 0 leaves a token out.
        denominator: what the sum is divided by.
    """
    hidden_UD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    weights_U, targets_U = weights_BT.reshape(-1) / denominator, targets_BT.reshape(-1)
    precision, head = model.precision, model.head
    if head.layout == head.kept:
        return cross_entropy(precision, hidden_UD, head.w_DV, targets_U, weights_U)
    return sharded_cross_entropy(precision, head.layout, hidden_UD, head.w_DV, targets_U, weights_U)


def log_probs(
    model: Transformer,
    hidden_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    draw: Draw = Draw(),  # noqa: B008
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log probability of each target and entropy of its distribution, nats.

    The backward pass computes logits again: four matrix products in all. On a mesh, of this
    device's tokens.

    Args:
        model: whose head it is.
        hidden_BTD: after the final norm.
        targets_BT: int32 next tokens.
        draw: how they were drawn; static.

    Returns:
        (log_probs_BT; entropy_BT, which has no gradient), float32.
    """
    hidden_UD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    precision, head, targets_U = model.precision, model.head, targets_BT.reshape(-1)
    if head.layout == head.kept:
        told = whole_log_probs(precision, draw, hidden_UD, head.w_DV, targets_U)
    else:
        told = sharded_log_probs(precision, head.layout, draw, hidden_UD, head.w_DV, targets_U)
    shape = targets_BT.shape
    return told.log_prob_U.reshape(shape), told.entropy_U.reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def cross_entropy(
    precision: Precision,
    hidden_UD: Float[Array, "U D"],
    head_DV: Float[Array, "D V"],
    targets_U: Int[Array, " U"],
    weights_U: Float[Array, " U"],
) -> Float[Array, ""]:
    """Weighted sum of cross entropies; [U, V] logits are never whole.

    Differentiated, each chunk's logits give the loss and both gradients at once, so nothing is
    computed twice: three matrix products in all.

    Args:
        precision: runs the head's contraction.
        hidden_UD: after the final norm.
        head_DV: the head.
        targets_U: int32 next tokens.
        weights_U: float32; 0 leaves a token out. No gradient.

    Returns:
        float32 scalar, nats.
    """
    chunks = _chunks(head_DV, hidden_UD, targets_U, weights_U)

    def chunk(total, x):
        return total + _chunk_loss(precision, head_DV, *x)[0], None

    return jax.lax.scan(chunk, jnp.float32(0.0), chunks)[0]


def _chunks(head_DV, *of_tokens):
    """Cuts [U, ...] into equal chunks of bounded logits, filled up with zeros."""
    tokens = of_tokens[0].shape[0]
    count = max(1, -(-tokens * head_DV.shape[1] // CHUNK_LOGITS))
    pad = -tokens % count

    def cut(x):
        return jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(count, -1, *x.shape[1:])

    return tuple(cut(x) for x in of_tokens)


@jax.named_scope("head")
def _chunk_loss(precision, head_DV, hidden_UD, targets_U, weights_U):
    """Loss of a chunk, and what its gradient needs."""
    logits_UV, pullback = jax.vjp(
        lambda h, w: precision.linear(h, w, "ud,dv->uv", role="head"), hidden_UD, head_DV
    )
    top_U = logits_UV.max(axis=-1)
    exp_UV = jnp.exp(logits_UV - top_U[:, None])
    sum_U = exp_UV.sum(axis=-1)
    target_U = jnp.take_along_axis(logits_UV, targets_U[:, None], axis=-1)[:, 0]
    loss = jnp.sum(weights_U * (top_U + jnp.log(sum_U) - target_U))
    return loss, (pullback, exp_UV, sum_U)


def _cross_entropy_forward(precision, hidden_UD, head_DV, targets_U, weights_U):
    def chunk(carry, x):
        total, d_head_DV = carry
        _, targets, weights = x
        loss, (pullback, exp_UV, sum_U) = _chunk_loss(precision, head_DV, *x)
        is_target_UV = targets[:, None] == jnp.arange(head_DV.shape[1])
        d_logits_UV = exp_UV * (weights / sum_U)[:, None]
        d_logits_UV = d_logits_UV - jnp.where(is_target_UV, weights[:, None], 0.0)
        d_hidden, d_head = pullback(d_logits_UV)
        return (total + loss, d_head_DV + d_head.astype(jnp.float32)), d_hidden

    chunks = _chunks(head_DV, hidden_UD, targets_U, weights_U)
    start = jnp.float32(0.0), jnp.zeros(head_DV.shape, jnp.float32)
    (loss, d_head_DV), d_hidden = jax.lax.scan(chunk, start, chunks)
    d_hidden_UD = d_hidden.reshape(-1, hidden_UD.shape[1])[: hidden_UD.shape[0]]
    return loss, (d_hidden_UD, d_head_DV.astype(head_DV.dtype), targets_U, weights_U)


def _cross_entropy_backward(precision, saved, cotangent):
    d_hidden_UD, d_head_DV, targets_U, weights_U = saved
    return (
        (d_hidden_UD * cotangent).astype(d_hidden_UD.dtype),
        (d_head_DV * cotangent).astype(d_head_DV.dtype),
        np.zeros(targets_U.shape, jax.dtypes.float0),
        jnp.zeros_like(weights_U),
    )


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def whole_log_probs(
    precision: Precision,
    draw: Draw,
    hidden_UD: Float[Array, "U D"],
    head_DV: Float[Array, "D V"],
    targets_U: Int[Array, " U"],
) -> Told:
    """`log_probs` where each device has the whole head.

    Args:
        precision: runs the head's contraction.
        draw: how targets were drawn.
        hidden_UD: after the final norm.
        head_DV: the head.
        targets_U: int32 next tokens.
    """
    return _whole_forward(precision, draw, hidden_UD, head_DV, targets_U)[0]


@jax.named_scope("head")
def _drawn_logits(precision, draw, hidden_UD, w_DV, id_V):
    """Logits over the temperature; far below all others for ids that were never drawn."""
    logits_UV = precision.linear(hidden_UD, w_DV, "ud,dv->uv", role="head") / draw.temperature
    if draw.allowed is None:
        return logits_UV
    return jnp.where(id_V < draw.allowed, logits_UV, -1e30)  # finite: times 0 it is 0


def _whole_forward(precision, draw, hidden_UD, head_DV, targets_U):
    id_V = jnp.arange(head_DV.shape[1])

    def chunk(_, x):
        hidden, targets = x
        logits_UV = _drawn_logits(precision, draw, hidden, head_DV, id_V)
        top_U = logits_UV.max(axis=-1)
        exp_UV = jnp.exp(logits_UV - top_U[:, None])
        sum_U = exp_UV.sum(axis=-1)
        lse_U = top_U + jnp.log(sum_U)
        mean_U = (exp_UV * logits_UV).sum(axis=-1) / sum_U
        target_U = jnp.take_along_axis(logits_UV, targets[:, None], axis=-1)[:, 0]
        return None, (target_U - lse_U, lse_U - mean_U, lse_U)

    _, found = jax.lax.scan(chunk, None, _chunks(head_DV, hidden_UD, targets_U))
    log_prob_U, entropy_U, lse_U = (x.reshape(-1)[: targets_U.size] for x in found)
    return Told(log_prob_U, entropy_U), (hidden_UD, head_DV, targets_U, lse_U)


def _whole_backward(precision, draw, saved, cotangent):
    hidden_UD, head_DV, targets_U, lse_U = saved
    id_V = jnp.arange(head_DV.shape[1])

    def chunk(d_head_DV, x):
        hidden, targets, lse, d_log_prob = x
        logits_UV, pullback = jax.vjp(
            lambda h, w: _drawn_logits(precision, draw, h, w, id_V), hidden, head_DV
        )
        is_target_UV = targets[:, None] == id_V
        d_logits_UV = (is_target_UV - jnp.exp(logits_UV - lse[:, None])) * d_log_prob[:, None]
        d_hidden, d_head = pullback(d_logits_UV)
        return d_head_DV + d_head.astype(jnp.float32), d_hidden

    chunks = _chunks(head_DV, hidden_UD, targets_U, lse_U, cotangent.log_prob_U)
    start = jnp.zeros(head_DV.shape, jnp.float32)
    d_head_DV, d_hidden = jax.lax.scan(chunk, start, chunks)
    d_hidden_UD = d_hidden.reshape(-1, hidden_UD.shape[1])[: hidden_UD.shape[0]]
    return (
        d_hidden_UD,
        d_head_DV.astype(head_DV.dtype),
        np.zeros(targets_U.shape, jax.dtypes.float0),
    )


whole_log_probs.defvjp(_whole_forward, _whole_backward)


# ---- the same where each device stores a part of the head ---------------------------------------


def sharded_cross_entropy(
    precision: Precision,
    layout: Layout,
    hidden_UD: Float[Array, "U D"],
    head_dv: Float[Array, "_D _V"],
    targets_U: Int[Array, " U"],
    weights_U: Float[Array, " U"],
) -> Float[Array, ""]:
    """`cross_entropy` of this device's tokens, with neither logits nor the head ever whole.

    Args:
        precision: runs the head's contraction.
        layout: mesh axes of the head's dimensions.
        hidden_UD: after the final norm.
        head_dv: this device's part of the head.
        targets_U: int32 next tokens.
        weights_U: float32; 0 leaves a token out. No gradient.

    Returns:
        float32 scalar, nats; of this device's tokens.
    """
    told = sharded_log_probs(precision, layout, Draw(), hidden_UD, head_dv, targets_U)
    return -jnp.sum(jax.lax.stop_gradient(weights_U) * told.log_prob_U)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def sharded_log_probs(
    precision: Precision,
    layout: Layout,
    draw: Draw,
    hidden_UD: Float[Array, "U D"],
    head_dv: Float[Array, "_D _V"],
    targets_U: Int[Array, " U"],
) -> Told:
    """`whole_log_probs` of this device's tokens, with neither logits nor the head ever whole.

    Goes over the vocabulary, a chunk of every device's columns at a time: gathers them, and keeps
    the largest logit and the sum of exponentials of each token so far (Milakov and Gimelshein,
    arXiv 1805.02867). The backward pass computes each chunk's logits again, and returns its
    gradient to the devices that store it, summed in float32: four matrix products in all.

    Args:
        precision: runs the head's contraction.
        layout: mesh axes of the head's dimensions.
        draw: how targets were drawn.
        hidden_UD: after the final norm.
        head_dv: this device's part of the head.
        targets_U: int32 next tokens.
    """
    return _sharded_forward(precision, layout, draw, hidden_UD, head_dv, targets_U)[0]


def _columns(hidden_UD, head_dv, layout) -> tuple[int, int]:
    """(chunks, columns of a chunk on each device): the fewest chunks of bounded logits."""
    local, devices = head_dv.shape[1], island.count(layout[1])
    most = max(1, CHUNK_LOGITS // max(1, hidden_UD.shape[0] * devices))
    columns = max(c for c in range(1, min(local, most) + 1) if local % c == 0)
    return local // columns, columns


def _place(targets_U, local: int, columns: int):
    """The chunk that holds each target, and its column there once the chunk is gathered."""
    device_U, here_U = targets_U // local, targets_U % local
    return here_U // columns, device_U * columns + here_U % columns


def _ids(local: int, columns: int, chunk, gathered: int):
    """The ids of the columns of a gathered chunk, the inverse of `_place`."""
    column_V = jnp.arange(gathered)
    return column_V // columns * local + chunk * columns + column_V % columns


@jax.named_scope("head")
def _gathered(precision, layout, head_dv, chunk, columns):
    part = jax.lax.dynamic_slice_in_dim(head_dv, chunk * columns, columns, axis=1)
    return island.whole(part, layout, ((), ()), precision.compute_dtype)


def _sharded_forward(precision, layout, draw, hidden_UD, head_dv, targets_U):
    chunks, columns = _columns(hidden_UD, head_dv, layout)
    chunk_U, column_U = _place(targets_U, head_dv.shape[1], columns)

    def step(carry, chunk):
        top_U, sum_U, weighed_U, target_U = carry
        w = _gathered(precision, layout, head_dv, chunk, columns)
        id_V = _ids(head_dv.shape[1], columns, chunk, w.shape[1])
        logits_UV = _drawn_logits(precision, draw, hidden_UD, w, id_V)
        new_U = jnp.maximum(top_U, logits_UV.max(axis=-1))
        shrunk_U, exp_UV = jnp.exp(top_U - new_U), jnp.exp(logits_UV - new_U[:, None])
        sum_U = sum_U * shrunk_U + exp_UV.sum(axis=-1)
        weighed_U = weighed_U * shrunk_U + (exp_UV * logits_UV).sum(axis=-1)
        here_U = jnp.take_along_axis(logits_UV, column_U[:, None], axis=-1)[:, 0]
        return (new_U, sum_U, weighed_U, jnp.where(chunk_U == chunk, here_U, target_U)), None

    zeros_U = jnp.zeros(targets_U.shape, jnp.float32)
    start = jnp.full(targets_U.shape, -jnp.inf, jnp.float32), zeros_U, zeros_U, zeros_U
    numbers = jnp.arange(chunks, dtype=jnp.int32)
    (top_U, sum_U, weighed_U, target_U), _ = jax.lax.scan(step, start, numbers)
    lse_U = top_U + jnp.log(sum_U)
    told = Told(target_U - lse_U, lse_U - weighed_U / sum_U)
    return told, (hidden_UD, head_dv, targets_U, lse_U)


def _sharded_backward(precision, layout, draw, saved, cotangent):
    hidden_UD, head_dv, targets_U, lse_U = saved
    chunks, columns = _columns(hidden_UD, head_dv, layout)
    chunk_U, column_U = _place(targets_U, head_dv.shape[1], columns)

    def step(carry, chunk):
        d_hidden_UD, d_head_dv = carry
        w, store = jax.vjp(
            lambda head_dv: _gathered(precision, layout, head_dv, chunk, columns), head_dv
        )
        id_V = _ids(head_dv.shape[1], columns, chunk, w.shape[1])
        logits_UV, pullback = jax.vjp(
            lambda h, w: _drawn_logits(precision, draw, h, w, id_V), hidden_UD, w
        )
        is_target_UV = column_U[:, None] == jnp.arange(logits_UV.shape[1])
        is_target_UV = is_target_UV & (chunk_U == chunk)[:, None]
        d_logits_UV = is_target_UV - jnp.exp(logits_UV - lse_U[:, None])
        d_hidden, d_w = pullback(d_logits_UV * cotangent.log_prob_U[:, None])
        return (
            d_hidden_UD + d_hidden.astype(jnp.float32),
            d_head_dv + store(d_w)[0].astype(jnp.float32),
        ), None

    zeros = jnp.zeros(hidden_UD.shape, jnp.float32), jnp.zeros(head_dv.shape, jnp.float32)
    (d_hidden_UD, d_head_dv), _ = jax.lax.scan(step, zeros, jnp.arange(chunks, dtype=jnp.int32))
    return (
        d_hidden_UD.astype(hidden_UD.dtype),
        d_head_dv.astype(head_dv.dtype),
        np.zeros(targets_U.shape, jax.dtypes.float0),
    )


sharded_log_probs.defvjp(_sharded_forward, _sharded_backward)
