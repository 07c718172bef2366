"""Which experts a token goes to, with which weight, and how evenly: V3's router and V2's.

Knows nothing about experts themselves. Everything here is float32.
Source: DeepSeek-V3 report, section 2.1.2; DeepSeek-V2 report, 2.2.

B sequences, T positions, U tokens, E experts, K experts a token, J expert groups.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dsjax.config import MoeConfig
from sharding import island
from sharding.rules import AxisRules


@jax.named_scope("router")
def affinities(logits: Float[Array, "... E"], config: MoeConfig) -> Float[Array, "... E"]:
    """Turns router logits into scores: sigmoid (V3, equation 15) or softmax over experts (V2)."""
    logits = logits.astype(jnp.float32)
    if config.score == "sigmoid":
        return jax.nn.sigmoid(logits)
    return jax.nn.softmax(logits, axis=-1)


@jax.named_scope("router")
def select(
    scores_UE: Float[Array, "U E"], bias_E: Float[Array, " E"] | None, config: MoeConfig
) -> Int[Array, "U K"]:
    """Chooses experts by group-limited top-k on biased scores.

    Source: V3 report, equation 16, and 2.1.2 "node-limited routing": a group scores the sum of its
    two best biased scores (V2: its best); the best groups are kept; experts outside them count as
    minus infinity, not 0, or a masked expert would beat one with a negative biased score.

    Args:
        scores_UE: affinities.
        bias_E: balancing bias, added for selection only; None for no bias.
        config: sizes.

    Returns:
        int32 [U, K], best first; ties go to the lower index. No gradient.
    """
    choice_UE = jax.lax.stop_gradient(scores_UE)
    if bias_E is not None:
        choice_UE = choice_UE + jax.lax.stop_gradient(bias_E)
    num_tokens, num_experts = choice_UE.shape
    if config.num_groups > 1 and config.groups_per_token < config.num_groups:
        grouped_UJe = choice_UE.reshape(num_tokens, config.num_groups, -1)
        best_UJ = grouped_UJe.max(axis=-1)
        if config.group_score == "top2_sum":
            best_UJ = jax.lax.top_k(grouped_UJe, 2)[0].sum(axis=-1)
        kept_Uj = jax.lax.top_k(best_UJ, config.groups_per_token)[1]
        kept_UJ = (kept_Uj[:, :, None] == jnp.arange(config.num_groups)).any(axis=1)
        grouped_UJe = jnp.where(kept_UJ[:, :, None], grouped_UJe, -jnp.inf)
        choice_UE = grouped_UJe.reshape(num_tokens, num_experts)
    return jax.lax.top_k(choice_UE, config.num_experts_per_token)[1]


@jax.named_scope("router")
def gates(
    scores_UE: Float[Array, "U E"], expert_UK: Int[Array, "U K"], config: MoeConfig
) -> Float[Array, "U K"]:
    """Weights of the chosen experts from unbiased scores (V3, equations 12-14).

    Returns:
        float32 [U, K]; rows sum to `gate_scale` where gates are normalised.
    """
    # A sum against one-hot rows: its gradient is a product, where a gather's is a scatter.
    chosen_UKE = expert_UK[:, :, None] == jnp.arange(scores_UE.shape[1])
    gates_UK = jnp.sum(jnp.where(chosen_UKE, scores_UE[:, None], 0.0), axis=-1)
    if config.normalize_gates:
        gates_UK = gates_UK / (gates_UK.sum(axis=-1, keepdims=True) + 1e-20)
    return gates_UK * config.gate_scale


class Balance(NamedTuple):
    """Balance statistics without their weights, each 1 for an even router.

    Separate arrays, so that what no loss weighs is never computed: a scan over layers drops the
    outputs that nobody reads, but keeps all of a stacked one.

    Attributes:
        expert: sum_e f_e P_e (V2, equation 23; V3, equation 17).
        device: over groups, sum_j f'_j P'_j (V2, equation 26).
        communication: over groups, sum_j f''_j P''_j (V2, equation 29).
    """

    expert: Array
    device: Array
    communication: Array


@jax.named_scope("balance")
def balance_loss(
    scores_BTE: Float[Array, "B T E"],
    expert_BTK: Int[Array, "B T K"],
    real_BT: Bool[Array, "B T"],
    config: MoeConfig,
    rules: AxisRules = AxisRules(),  # noqa: B008
) -> Balance:
    """Sequence-wise balance statistics of each row; the groups of the router are V2's devices.

    Source: V2 report, equations 23-31; V3 report, equations 17-20. With H_t the experts that count
    for token t (`balance_counts`) and means over a row's tokens: P_e = mean of s_e / sum s,
    f_e = E / K * mean of [e in H_t]; P'_j = P''_j = the sum of P_e over group j, f'_j = the mean
    of f_e over it, f''_j = J / groups_per_token * mean of [group j holds one of H_t]. Padding
    counts in none.

    Args:
        scores_BTE: affinities.
        expert_BTK: the selected experts.
        real_BT: false for padding.
        config: sizes, and what counts.
        rules: rows may be cut over devices, each of which then returns its share.

    Returns:
        float32 [B] each; 0 for a row of nothing but padding. The gradient flows through P alone.
    """
    num_experts, per_token = config.num_experts, config.num_experts_per_token
    num_groups, groups_per_token = config.num_groups, config.groups_per_token
    real_BT1 = real_BT[..., None].astype(jnp.float32)

    def over_row(x_BTE):
        return island.sum_row(jnp.sum(x_BTE, axis=1), rules)

    tokens_B1 = jnp.maximum(over_row(real_BT1), 1.0)
    counted_BTK = expert_BTK
    if config.balance_counts == "best_scores":
        counted_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), per_token)[1]
    hit_BTE = (counted_BTK[..., None] == jnp.arange(num_experts)).any(axis=2)
    frequency_BE = over_row(hit_BTE * real_BT1) * num_experts / (per_token * tokens_B1)
    # V2 has s itself in P: its softmax sums to 1 already.
    share_BTE = scores_BTE / (scores_BTE.sum(axis=-1, keepdims=True) + 1e-20)
    probability_BE = over_row(share_BTE * real_BT1) / tokens_B1
    expert_B = jnp.sum(frequency_BE * probability_BE, axis=-1)
    with jax.named_scope("groups"):
        probability_BJ = probability_BE.reshape(-1, num_groups, num_experts // num_groups).sum(-1)
        frequency_BJ = frequency_BE.reshape(-1, num_groups, num_experts // num_groups).mean(-1)
        sent_BTJ = hit_BTE.reshape(*real_BT.shape, num_groups, -1).any(axis=-1)
        sent_BJ = over_row(sent_BTJ * real_BT1) * num_groups / (groups_per_token * tokens_B1)
        device_B = jnp.sum(frequency_BJ * probability_BJ, axis=-1)
        communication_B = jnp.sum(sent_BJ * probability_BJ, axis=-1)
    share = 1.0 / island.row_devices(rules)
    return Balance(expert_B * share, device_B * share, communication_B * share)


def update_bias(
    bias_LE: Float[Array, "L E"], load_LE: Int[Array, "L E"], speed: Float[Array, ""] | float
) -> Float[Array, "L E"]:
    """Moves each expert's bias by `speed` against its load error (V3 report, 2.1.2; gamma).

    Args:
        bias_LE: float32.
        load_LE: tokens of each expert in the whole step, over all devices and micro-batches.
        speed: gamma.
    """
    load_LE = load_LE.astype(jnp.float32)
    return bias_LE + speed * jnp.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)


def health(
    load_LE: Int[Array, "L E"], bias_LE: Float[Array, "L E"] | None
) -> dict[str, Float[Array, " L"]]:
    """Signs of an uneven router, a number a layer.

    Returns:
        `max_violation` (largest load over the mean, minus 1), `load_entropy` (1 for even),
        `dead_experts` (experts with no token), `bias_spread` (largest bias minus smallest).
    """
    load_LE = load_LE.astype(jnp.float32)
    share_LE = load_LE / jnp.maximum(load_LE.sum(axis=-1, keepdims=True), 1.0)
    entropy_L = -jnp.sum(jax.scipy.special.xlogy(share_LE, share_LE), axis=-1)
    mean_L1 = jnp.maximum(load_LE.mean(axis=-1), 1e-20)
    signs = {
        "max_violation": load_LE.max(axis=-1) / mean_L1 - 1.0,
        "load_entropy": entropy_L / jnp.log(load_LE.shape[-1]),
        "dead_experts": jnp.sum(load_LE == 0, axis=-1).astype(jnp.float32),
    }
    if bias_LE is not None:
        signs["bias_spread"] = bias_LE.max(axis=-1) - bias_LE.min(axis=-1)
    return signs
