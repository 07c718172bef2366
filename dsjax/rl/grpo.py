"""Group relative policy optimisation: a loss for the same step that pretrains.

Knows nothing about rewards or how completions came about. Sources: DeepSeekMath (arXiv 2402.03300)
4.1, R1 (arXiv 2501.12948) equations 1-3, DAPO (2503.14476), Dr. GRPO (2503.20783), GSPO
(2507.18071), DeepSeek-V3.2 (2512.02556) 3.1.

Rows are packed as in pretraining, a completion behind its prompt in a segment of its own. What
divides a token's loss by its sequence's length is part of the weights that the host makes
(`token_weights`), so that a loss is the same however sequences are cut into micro-batches, packed
or spread over devices.

B rows, T positions, K experts a token, L layers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dsjax.config import RlConfig
from dsjax.model.transformer import Transformer
from dsjax.train.loss import Batch, LossAux, overflow_of
from dsjax.train.vocabulary import Draw, log_probs
from sharding import island
from sharding.rules import AxisRules

ROUTING = "routing/"  # names of a batch that hold choices to replay, before a stack's


@no_type_check  # its leaves may be shapes, shardings or flags
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GrpoTotals:
    """Denominators, from the whole global batch.

    Attributes:
        weight: float32, what the weighted sum of tokens' losses is divided by.
        tokens: float32, completion tokens that are learned from; metrics are means over them.
    """

    weight: Array | np.ndarray
    tokens: Array | np.ndarray


def token_weights(mask_BT: np.ndarray, segments_BT: np.ndarray, aggregation: str) -> np.ndarray:
    """A token's share in the sum that is divided by `GrpoLoss.totals`, on the host.

    Args:
        mask_BT: whether a target is a completion token to learn from.
        segments_BT: sequences of each row.
        aggregation: `RlConfig.aggregation`: with "grpo" each sequence's tokens share 1.

    Returns:
        float32 [B, T].
    """
    weights_BT = np.asarray(mask_BT, np.float32)
    if aggregation == "grpo":
        for weights_T, segments_T in zip(weights_BT, segments_BT, strict=True):
            length = np.bincount(segments_T, weights=weights_T)
            weights_T /= np.maximum(length[segments_T], 1.0)
    return weights_BT


def surrogate(
    ratio: Float[Array, "..."],
    advantage: Float[Array, "..."],
    clip_low: float,
    clip_high: float,
) -> Float[Array, "..."]:
    """min(r A, clip(r, 1 - low, 1 + high) A), which is to be maximised (R1, equation 1)."""
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return jnp.minimum(ratio * advantage, clipped * advantage)


def kl_estimate(log_prob: Float[Array, "..."], log_ref: Float[Array, "..."]) -> Array:
    """k3 of KL(policy || reference): e^d - d - 1 with d = log_ref - log_prob (R1, equation 2)."""
    difference = log_ref - log_prob
    return jnp.expm1(difference) - difference


def sequence_sums(
    x_BT: Float[Array, "B T"], segments_BT: Int[Array, "B T"], rules: AxisRules
) -> Float[Array, "B T"]:
    """At each token the sum over its sequence, whose tokens may lie on several devices."""
    length = segments_BT.shape[1] * island.row_devices(rules)

    def summed(x_T, segments_T):
        return jax.ops.segment_sum(x_T, segments_T, num_segments=length + 1)

    sums_BS = island.sum_row(jax.vmap(summed)(x_BT, segments_BT), rules)
    return jnp.take_along_axis(sums_BS, segments_BT, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GrpoLoss:
    """The clipped surrogate and the divergence from a reference; no MTP, no balance loss.

    Beside a packed batch's `tokens_BT targets_BT segments_BT positions_BT` it reads `weights_BT`
    (`token_weights`), `advantages_BT`, `log_sample_BT` (the sampler's), `log_old_BT` (the policy's
    that the ratio is against), `log_ref_BT` where there is a KL weight, and with replay
    `routing/<stack>` [B, T, L, K].
    """

    draw: Draw
    aggregation: Literal["grpo", "dapo", "dr_grpo"]
    ratio: Literal["token", "sequence"]
    clip_low: float
    clip_high: float
    kl_weight: float
    kl: Literal["k3", "unbiased"]
    importance_cap: float | None
    off_policy_mask: float | None
    max_tokens: int
    sequences: int

    @classmethod
    def of(cls, config: RlConfig, *, allowed: int | None = None) -> "GrpoLoss":
        """The loss that a configuration describes.

        Args:
            config: of the run.
            allowed: ids from here on are never drawn.
        """
        return cls(
            draw=Draw(config.temperature, allowed),
            aggregation=config.aggregation,
            ratio=config.ratio,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_weight=config.kl_weight,
            kl=config.kl,
            importance_cap=config.importance_cap,
            off_policy_mask=config.off_policy_mask,
            max_tokens=config.max_completion_tokens,
            sequences=config.completions // config.mini_batches,
        )

    def totals(
        self,
        batch: Mapping[str, Array | np.ndarray],
        progress: float,
        over_processes: Callable[[np.ndarray], np.ndarray] = lambda counts: counts,
    ) -> GrpoTotals:
        """Denominators of a whole batch, on the host.

        "grpo" divides by the sequences that are learned from, "dapo" by their tokens, "dr_grpo" by
        all sequences times the longest that they may be, whatever became of them.

        Args:
            batch: NumPy arrays, before it is cut into micro-batches; this process's rows.
            progress: of the run, which decides nothing here.
            over_processes: adds the counts of all processes up.
        """
        weights_BT = np.asarray(batch["weights_BT"], np.float64)
        weight, tokens = over_processes(np.array([weights_BT.sum(), (weights_BT > 0).sum()]))
        if self.aggregation == "dr_grpo":
            weight = self.sequences * self.max_tokens
        return GrpoTotals(
            weight=np.asarray(max(weight, 1e-6), np.float32),
            tokens=np.asarray(max(tokens, 1.0), np.float32),
        )

    def __call__(
        self, model: Transformer, batch: Batch, totals: GrpoTotals
    ) -> tuple[Float[Array, ""], LossAux]:
        """Loss of a micro-batch, already divided by the totals of its batch.

        Returns:
            (scalar to differentiate; metrics, see `dsjax.train.metrics`; expert loads by stack).
        """
        rules, segments_BT = model.rules, batch["segments_BT"]
        output = model(
            batch["tokens_BT"],
            positions_BT=batch["positions_BT"],
            segments_BT=segments_BT,
            routing=replayed(batch),
        )
        log_BT, entropy_BT = log_probs(model, output.hidden_BTD, batch["targets_BT"], self.draw)
        weights_BT, advantages_BT = batch["weights_BT"], batch["advantages_BT"]
        real_BT = weights_BT > 0
        # Nothing that is left out may reach an exponential: 0 times infinity is not 0.
        log_BT = jnp.where(real_BT, log_BT, 0.0)
        sample_BT, old_BT = (
            jnp.where(real_BT, batch[name], 0.0) for name in ("log_sample_BT", "log_old_BT")
        )

        def mean_of_sequence(x_BT):
            count_BT = sequence_sums(real_BT.astype(jnp.float32), segments_BT, rules)
            sums_BT = sequence_sums(jnp.where(real_BT, x_BT, 0.0), segments_BT, rules)
            return sums_BT / jnp.maximum(count_BT, 1.0)

        moved_BT = log_BT - old_BT
        if self.ratio == "sequence":
            moved_BT = mean_of_sequence(moved_BT)
        ratio_BT = jnp.exp(moved_BT)
        gain_BT = surrogate(ratio_BT, advantages_BT, self.clip_low, self.clip_high)
        told = {"ratio_mean": ratio_BT}
        if self.importance_cap is not None:
            importance_BT = jnp.exp(old_BT - sample_BT)
            capped_BT = jnp.minimum(importance_BT, self.importance_cap)
            told |= {"importance_mean": importance_BT, "importance_capped_mean": capped_BT}
            gain_BT = gain_BT * capped_BT
        if self.off_policy_mask is not None:
            drift_BT = mean_of_sequence(jax.lax.stop_gradient(sample_BT - log_BT))
            kept_BT = (advantages_BT >= 0) | (drift_BT <= self.off_policy_mask)
            told["off_policy_share"] = (~kept_BT).astype(jnp.float32)
            gain_BT = jnp.where(kept_BT, gain_BT, 0.0)
        loss_policy = jnp.sum(-gain_BT * weights_BT) / totals.weight
        total, metrics = loss_policy, {"loss_policy": loss_policy}
        if self.kl_weight > 0:
            ref_BT = jnp.where(real_BT, batch["log_ref_BT"], 0.0)
            kl_BT = kl_estimate(log_BT, ref_BT)
            told["kl"] = kl_BT
            if self.kl == "unbiased":
                kl_BT = jnp.exp(log_BT - old_BT) * kl_BT
            loss_kl = jnp.sum(kl_BT * weights_BT) / totals.weight
            total, metrics["loss_kl"] = total + self.kl_weight * loss_kl, loss_kl
        told |= {
            "entropy": entropy_BT,
            "clipped_low": (ratio_BT < 1.0 - self.clip_low) & (advantages_BT < 0),
            "clipped_high": (ratio_BT > 1.0 + self.clip_high) & (advantages_BT > 0),
            "logprob_gap": jnp.abs(log_BT - sample_BT),
        }
        for name, of_token_BT in told.items():
            metrics[name] = jnp.sum(jnp.where(real_BT, of_token_BT, 0.0)) / totals.tokens
        metrics["loss_total"] = total
        gap_BT = jnp.where(real_BT, jnp.abs(log_BT - sample_BT), 0.0)
        peaks = {
            "ratio_max": jnp.max(jnp.where(real_BT, ratio_BT, 0.0)),
            "ratio_inverse_max": jnp.max(jnp.where(real_BT, 1.0 / ratio_BT, 0.0)),
            "logprob_gap_max": jnp.max(gap_BT),
        }
        metrics, peaks = jax.lax.stop_gradient((metrics, peaks))
        return total, LossAux(metrics, output.aux.load, overflow_of(output.aux), peaks)


def score(
    model: Transformer, batch: Batch, draw: Draw
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log probability of each target and entropy of its distribution; no loss.

    Args:
        model: the policy, or the reference.
        batch: as of `GrpoLoss`; only the rows are read, and choices to replay.
        draw: how targets were drawn.
    """
    output = model(
        batch["tokens_BT"],
        positions_BT=batch["positions_BT"],
        segments_BT=batch["segments_BT"],
        routing=replayed(batch),
    )
    return log_probs(model, output.hidden_BTD, batch["targets_BT"], draw)


def replayed(batch: Mapping[str, Any]) -> dict[str, Array] | None:
    """The choices of experts that a batch brings, as the model takes them: [L, B, T, K]."""
    found = {
        name.removeprefix(ROUTING): jnp.moveaxis(value, 2, 0)
        for name, value in batch.items()
        if name.startswith(ROUTING)
    }
    return found or None
