"""Losses over packed batches: next-token cross entropy in chunks, MTP, sequence-wise balances.

Knows nothing about optimizers or micro-batches: denominators come from the whole batch, so
micro-batches and devices only sum.

B sequences, T positions, U tokens, D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import Config, ScheduleConfig
from dsjax.model.mtp import depth_segments
from dsjax.model.router import Balance
from dsjax.model.transformer import Aux, Transformer
from dsjax.precision import Precision
from dsjax.train.schedule import value_at
from sharding import island
from sharding.rules import AxisRules, Layout

Batch = dict[str, Array]  # tokens_BT targets_BT segments_BT positions_BT weights_BT, and more

# Logits a chunk: 32 MiB in float32, a few times a CPU's cache and enough to fill an accelerator.
CHUNK_LOGITS = 1 << 23


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """What a loss divides by and weighs with, from the whole global batch and the run's progress.

    Attributes:
        weight: float32, the sum of the target weights.
        rows: float32, rows that hold a token.
        mtp_weight: float32 [M], the target weights that each MTP depth keeps.
        mtp_rows: float32 [M], rows that hold a token for each MTP depth.
        mtp_scale: float32, lambda.
    """

    weight: Array | np.ndarray
    rows: Array | np.ndarray
    mtp_weight: Array | np.ndarray
    mtp_rows: Array | np.ndarray
    mtp_scale: Array | np.ndarray


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossAux:
    """What a loss tells beside its value, all of which sums over micro-batches and devices.

    Attributes:
        metrics: float32 scalars.
        load: {stack: int32 [L, E]} tokens of each expert.
        overflow: int32, tokens that did not fit the exchange between devices.
    """

    metrics: dict[str, Array]
    load: dict[str, Array]
    overflow: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainLoss:
    """Cross entropy of the next token, plus lambda * MTP, plus each alpha * its balance.

    Source: V3 report, equations 17-20 (balance) and 24-25 (MTP); V2 report, 23-31 (its balances).
    """

    mtp_depth: int
    mtp_scale: ScheduleConfig
    balance_weight: float
    device_balance_weight: float = 0.0
    communication_balance_weight: float = 0.0

    @classmethod
    def of(cls, config: Config) -> "PretrainLoss":
        """The loss that a configuration describes."""
        return cls(
            mtp_depth=config.model.mtp.depth if config.model.mtp else 0,
            mtp_scale=config.train.mtp_loss_weight,
            balance_weight=config.train.balance_loss_weight,
            device_balance_weight=config.train.device_balance_loss_weight,
            communication_balance_weight=config.train.communication_balance_loss_weight,
        )

    def counts(self, batch: Mapping[str, Array | np.ndarray]) -> np.ndarray:
        """What `totals` is made of, of some rows; of several parts of a batch they add up.

        Args:
            batch: NumPy arrays of whole rows.

        Returns:
            float64 [2 + 2M]: target weights, rows that hold a token, then the same two for each
            MTP depth.
        """
        segments_BT = np.asarray(batch["segments_BT"])
        weights_BT = np.asarray(batch["weights_BT"], np.float32)
        found = [weights_BT.sum(dtype=np.float64), (segments_BT != 0).any(axis=1).sum()]
        for k in range(self.mtp_depth):
            found.append(np.asarray(_mtp_weights(weights_BT, k)).sum(dtype=np.float64))
            seen_BT = np.asarray(depth_segments(segments_BT, k))
            found.append((seen_BT != 0).any(axis=1).sum())
        return np.asarray(found, np.float64)

    def totals(
        self,
        batch: Mapping[str, Array | np.ndarray],
        progress: float,
        over_processes: Callable[[np.ndarray], np.ndarray] = lambda counts: counts,
    ) -> Totals:
        """Denominators of a whole batch, on the host.

        Args:
            batch: NumPy arrays, before it is cut into micro-batches; this process's rows.
            progress: share of the run's tokens seen.
            over_processes: adds the counts of all processes up.
        """
        counts = over_processes(self.counts(batch))

        def at_least_one(values):
            return np.asarray(np.maximum(np.asarray(values, np.float32), 1.0))

        return Totals(
            weight=at_least_one(counts[0]),
            rows=at_least_one(counts[1]),
            mtp_weight=at_least_one(counts[2::2]),
            mtp_rows=at_least_one(counts[3::2]),
            mtp_scale=np.asarray(value_at(self.mtp_scale, progress)),
        )

    def __call__(
        self, model: Transformer, batch: Batch, totals: Totals
    ) -> tuple[Float[Array, ""], LossAux]:
        """Loss of a micro-batch, already divided by the totals of its batch.

        On a mesh, of this device's tokens: what all devices return adds up to the micro-batch's.

        Returns:
            (scalar to differentiate; metrics `loss`, `loss_mtp`, `loss_balance`, `loss_total` in
            nats a token, the first three before their weights, and where they have a weight
            `loss_balance_device` and `loss_balance_communication`; expert loads by stack).
        """
        rules = model.rules
        segments_BT, positions_BT = batch["segments_BT"], batch["positions_BT"]
        targets_BT, weights_BT = batch["targets_BT"], batch["weights_BT"]
        output = model(batch["tokens_BT"], positions_BT=positions_BT, segments_BT=segments_BT)
        loss = _mean_cross_entropy(model, output.hidden_BTD, targets_BT, weights_BT, totals.weight)
        balance = _balance(output.aux, totals.rows)
        load, overflow = dict(output.aux.load), _overflow(output.aux)
        hidden_BTD, loss_mtp, mtp_load = output.hidden_BTD, jnp.float32(0.0), []
        for k in range(self.mtp_depth):
            hidden_BTD, aux = model.mtp(
                k,
                hidden_BTD,
                _shift(targets_BT, k, rules),
                positions_BT=positions_BT,
                segments_BT=jnp.asarray(depth_segments(segments_BT, k, rules)),
            )
            loss_mtp = loss_mtp + _mean_cross_entropy(
                model,
                hidden_BTD,
                _shift(targets_BT, k + 1, rules),
                _mtp_weights(weights_BT, k, rules),
                totals.mtp_weight[k] * self.mtp_depth,
            )
            balance = jax.tree.map(jnp.add, balance, _balance(aux, totals.mtp_rows[k]))
            mtp_load += list(aux.load.values())
            overflow = overflow + _overflow(aux)
        if mtp_load:
            load["mtp"] = jnp.concatenate(mtp_load)
        total = loss + totals.mtp_scale * loss_mtp + self.balance_weight * balance.expert
        metrics = {"loss": loss, "loss_balance": balance.expert}
        for name, weight, value in (
            ("loss_balance_device", self.device_balance_weight, balance.device),
            (
                "loss_balance_communication",
                self.communication_balance_weight,
                balance.communication,
            ),
        ):
            if weight > 0:
                total = total + weight * value
                metrics[name] = value
        metrics["loss_total"] = total
        if self.mtp_depth:
            metrics["loss_mtp"] = loss_mtp
        return total, LossAux(metrics, load, overflow)


def next_token_loss(model: Transformer, batch: Batch) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum over a batch of the weighted cross entropies of the next token, in nats.

    Returns:
        (nats, tokens that did not fit the exchange between devices); on a mesh, of the device's.
    """
    output = model(
        batch["tokens_BT"], positions_BT=batch["positions_BT"], segments_BT=batch["segments_BT"]
    )
    nats = _mean_cross_entropy(
        model, output.hidden_BTD, batch["targets_BT"], batch["weights_BT"], 1.0
    )
    return nats, _overflow(output.aux)


def _shift(x_BT, steps: int, rules: AxisRules = AxisRules()):  # noqa: B008
    """Moves a row `steps` to the left, zeros behind."""
    return island.shift_row(x_BT, steps, rules)


def _mtp_weights(weights_BT, depth: int, rules: AxisRules = AxisRules()):  # noqa: B008
    """Weight of target i + 2 + depth at position i; 0 unless every token on the way is a target."""
    kept_BT = _shift(weights_BT, depth + 1, rules)
    for k in range(depth + 1):
        kept_BT = kept_BT * (_shift(weights_BT, k, rules) > 0)
    return kept_BT


def _overflow(aux: Aux) -> Array:
    return sum((told.sum() for told in aux.overflow.values()), jnp.int32(0))


def _balance(aux: Aux, rows) -> Balance:
    """Means over rows, summed over the layers of all stacks."""

    def mean(name):
        told = (getattr(balance, name).sum() for balance in aux.balance.values())
        return sum(told, jnp.float32(0.0)) / rows

    return Balance(*map(mean, Balance._fields))


def _mean_cross_entropy(model, hidden_BTD, targets_BT, weights_BT, denominator):
    hidden_UD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    weights_U, targets_U = weights_BT.reshape(-1) / denominator, targets_BT.reshape(-1)
    precision, head = model.precision, model.head
    if head.layout == head.kept:
        return cross_entropy(precision, hidden_UD, head.w_DV, targets_U, weights_U)
    return sharded_cross_entropy(precision, head.layout, hidden_UD, head.w_DV, targets_U, weights_U)


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
    chunks = _chunks(hidden_UD, head_DV, targets_U, weights_U)

    def chunk(total, x):
        return total + _chunk_loss(precision, head_DV, *x)[0], None

    return jax.lax.scan(chunk, jnp.float32(0.0), chunks)[0]


def _chunks(hidden_UD, head_DV, targets_U, weights_U):
    """Cuts tokens into equal chunks, padded with weight 0."""
    tokens = hidden_UD.shape[0]
    count = max(1, -(-tokens * head_DV.shape[1] // CHUNK_LOGITS))
    pad = -tokens % count

    def cut(x):
        return jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(count, -1, *x.shape[1:])

    return cut(hidden_UD), cut(targets_U), cut(weights_U)


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

    chunks = _chunks(hidden_UD, head_DV, targets_U, weights_U)
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


# ---- the same where each device stores a part of the head ---------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sharded_cross_entropy(
    precision: Precision,
    layout: Layout,
    hidden_UD: Float[Array, "U D"],
    head_dv: Float[Array, "_D _V"],
    targets_U: Int[Array, " U"],
    weights_U: Float[Array, " U"],
) -> Float[Array, ""]:
    """`cross_entropy` of this device's tokens, with neither logits nor the head ever whole.

    Goes over the vocabulary, a chunk of every device's columns at a time: gathers them, and keeps
    the largest logit and the sum of exponentials of each token so far (Milakov and Gimelshein,
    arXiv 1805.02867). The backward pass computes each chunk's logits again, and returns its
    gradient to the devices that store it, summed in float32: four matrix products in all.

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
    return _sharded_forward(precision, layout, hidden_UD, head_dv, targets_U, weights_U)[0]


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


@jax.named_scope("head")
def _gathered(precision, layout, head_dv, chunk, columns):
    part = jax.lax.dynamic_slice_in_dim(head_dv, chunk * columns, columns, axis=1)
    return island.whole(part, layout, ((), ()), precision.compute_dtype)


def _sharded_forward(precision, layout, hidden_UD, head_dv, targets_U, weights_U):
    chunks, columns = _columns(hidden_UD, head_dv, layout)
    chunk_U, column_U = _place(targets_U, head_dv.shape[1], columns)

    def step(carry, chunk):
        top_U, sum_U, target_U = carry
        w = _gathered(precision, layout, head_dv, chunk, columns)
        logits_UV = precision.linear(hidden_UD, w, "ud,dv->uv", role="head")
        new_U = jnp.maximum(top_U, logits_UV.max(axis=-1))
        sum_U = sum_U * jnp.exp(top_U - new_U) + jnp.exp(logits_UV - new_U[:, None]).sum(axis=-1)
        here_U = jnp.take_along_axis(logits_UV, column_U[:, None], axis=-1)[:, 0]
        return (new_U, sum_U, jnp.where(chunk_U == chunk, here_U, target_U)), None

    zeros_U = jnp.zeros(targets_U.shape, jnp.float32)
    start = jnp.full(targets_U.shape, -jnp.inf, jnp.float32), zeros_U, zeros_U
    (top_U, sum_U, target_U), _ = jax.lax.scan(step, start, jnp.arange(chunks, dtype=jnp.int32))
    lse_U = top_U + jnp.log(sum_U)
    loss = jnp.sum(weights_U * (lse_U - target_U))
    return loss, (hidden_UD, head_dv, targets_U, weights_U, lse_U)


def _sharded_backward(precision, layout, saved, cotangent):
    hidden_UD, head_dv, targets_U, weights_U, lse_U = saved
    chunks, columns = _columns(hidden_UD, head_dv, layout)
    chunk_U, column_U = _place(targets_U, head_dv.shape[1], columns)
    scale_U1 = (weights_U * cotangent)[:, None]

    def step(carry, chunk):
        d_hidden_UD, d_head_dv = carry
        w, store = jax.vjp(
            lambda head_dv: _gathered(precision, layout, head_dv, chunk, columns), head_dv
        )
        logits_UV, pullback = jax.vjp(
            lambda h, w: precision.linear(h, w, "ud,dv->uv", role="head"), hidden_UD, w
        )
        is_target_UV = column_U[:, None] == jnp.arange(logits_UV.shape[1])
        is_target_UV = is_target_UV & (chunk_U == chunk)[:, None]
        d_logits_UV = jnp.exp(logits_UV - lse_U[:, None]) - is_target_UV
        d_hidden, d_w = pullback(d_logits_UV * scale_U1)
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
        jnp.zeros_like(weights_U),
    )


sharded_cross_entropy.defvjp(_sharded_forward, _sharded_backward)
