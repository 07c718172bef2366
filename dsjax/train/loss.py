"""Losses over packed batches: next-token cross entropy, MTP, sequence-wise balances.

Knows nothing about optimizers or micro-batches: denominators come from the whole batch, so
micro-batches and devices only sum.

B sequences, T positions, U tokens, D width, V vocabulary.
"""

import dataclasses
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
from dsjax.train.schedule import value_at
from dsjax.train.vocabulary import mean_cross_entropy
from sharding import island
from sharding.rules import AxisRules

Batch = dict[str, Array]  # tokens_BT targets_BT segments_BT positions_BT weights_BT, and more


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
    """What a loss tells beside its value; over micro-batches and devices it sums, but for `peaks`.

    Attributes:
        metrics: float32 scalars.
        load: {stack: int32 [L, E]} tokens of each expert.
        overflow: int32, tokens that did not fit the exchange between devices.
        peaks: float32 scalars of which the largest is told.
    """

    metrics: dict[str, Array]
    load: dict[str, Array]
    overflow: Array
    peaks: dict[str, Array] = dataclasses.field(default_factory=dict)


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
        loss = mean_cross_entropy(model, output.hidden_BTD, targets_BT, weights_BT, totals.weight)
        balance = _balance(output.aux, totals.rows)
        load, overflow = dict(output.aux.load), overflow_of(output.aux)
        hidden_BTD, loss_mtp, mtp_load = output.hidden_BTD, jnp.float32(0.0), []
        for k in range(self.mtp_depth):
            hidden_BTD, aux = model.mtp(
                k,
                hidden_BTD,
                _shift(targets_BT, k, rules),
                positions_BT=positions_BT,
                segments_BT=jnp.asarray(depth_segments(segments_BT, k, rules)),
            )
            loss_mtp = loss_mtp + mean_cross_entropy(
                model,
                hidden_BTD,
                _shift(targets_BT, k + 1, rules),
                _mtp_weights(weights_BT, k, rules),
                totals.mtp_weight[k] * self.mtp_depth,
            )
            balance = jax.tree.map(jnp.add, balance, _balance(aux, totals.mtp_rows[k]))
            mtp_load += list(aux.load.values())
            overflow = overflow + overflow_of(aux)
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
    nats = mean_cross_entropy(
        model, output.hidden_BTD, batch["targets_BT"], batch["weights_BT"], 1.0
    )
    return nats, overflow_of(output.aux)


def _shift(x_BT, steps: int, rules: AxisRules = AxisRules()):  # noqa: B008
    """Moves a row `steps` to the left, zeros behind."""
    return island.shift_row(x_BT, steps, rules)


def _mtp_weights(weights_BT, depth: int, rules: AxisRules = AxisRules()):  # noqa: B008
    """Weight of target i + 2 + depth at position i; 0 unless every token on the way is a target."""
    kept_BT = _shift(weights_BT, depth + 1, rules)
    for k in range(depth + 1):
        kept_BT = kept_BT * (_shift(weights_BT, k, rules) > 0)
    return kept_BT


def overflow_of(aux: Aux) -> Array:
    """Tokens of all layers that found no room in the exchange between devices."""
    return sum((told.sum() for told in aux.overflow.values()), jnp.int32(0))


def _balance(aux: Aux, rows) -> Balance:
    """Means over rows, summed over the layers of all stacks."""

    def mean(name):
        told = (getattr(balance, name).sum() for balance in aux.balance.values())
        return sum(told, jnp.float32(0.0)) / rows

    return Balance(*map(mean, Balance._fields))
