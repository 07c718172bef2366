"""Mixture of experts: shared experts plus gated routed ones, a token and an expert at a time.

Source: V3 eq. 12, V2 eq. 20.
"""

from types import SimpleNamespace

import numpy as np

from .layers import swiglu
from .router import expert_load, route_v2, route_v3, top_k, v2_balance_losses


def route(logits_UE, weights, moe):
    """Chooses V3's or V2's router by `moe.score`; see `router` for what comes back."""
    sizes = {
        "num_groups": moe.num_groups,
        "groups_per_token": moe.groups_per_token,
        "experts_per_token": moe.num_experts_per_token,
        "scale": moe.gate_scale,
    }
    if moe.score == "sigmoid":
        bias_E = weights.get("bias_E", np.zeros(logits_UE.shape[-1]))
        return route_v3(logits_UE, bias_E, normalize=moe.normalize_gates, **sizes)
    assert moe.score == "softmax", moe.score
    assert not moe.normalize_gates, "V2's gates are raw scores"
    return route_v2(logits_UE, **sizes)


def balances(scores_BTE, expert_BTK, moe, segments_BT):
    """The three balance losses, with the experts and the scores that the model's report counts.

    Source: V2 eq. 23-31, with the selected experts and s; V3 eq. 17-20, with the top K of s itself
    (no bias, no groups) and s over its sum.
    """
    if moe.balance_counts == "best_scores":
        k = moe.num_experts_per_token
        expert_BTK = np.array([[top_k(s_E, k) for s_E in s_TE] for s_TE in scores_BTE])
    if moe.score == "sigmoid":
        scores_BTE = scores_BTE / np.sum(scores_BTE, axis=-1, keepdims=True)
    sizes = {"num_groups": moe.num_groups, "groups_per_token": moe.groups_per_token}
    return v2_balance_losses(scores_BTE, expert_BTK, segments_BT, **sizes)


def moe_layer(x_BTD, weights, moe, *, segments_BT):
    """Shared experts of x, plus each chosen expert of x times its gate (no residual here).

    Source: V3 eq. 12. Padding is computed too, and counts nowhere.

    Returns:
        (out_BTD, aux: load_E int, balance (every alpha 1: expert, device, communication),
        gates_BTK, expert_BTK, scores_BTE).
    """
    batch, length, width = x_BTD.shape
    x_UD = x_BTD.reshape(batch * length, width)
    gates_UK, expert_UK, scores_UE = route(x_UD @ weights["w_router_DE"], weights, moe)
    out_UD = np.zeros(x_UD.shape)
    for u in range(batch * length):
        if weights.get("shared") is not None:
            shared = weights["shared"]
            out_UD[u] += swiglu(x_UD[u], shared["w_in_D2F"], shared["w_down_FD"])
        for gate, e in zip(gates_UK[u], expert_UK[u], strict=True):
            w_in_D2F, w_down_FD = weights["w_in_ED2F"][e], weights["w_down_EFD"][e]
            out_UD[u] += gate * swiglu(x_UD[u], w_in_D2F, w_down_FD)
    num_experts = scores_UE.shape[-1]
    scores_BTE = scores_UE.reshape(batch, length, num_experts)
    aux = SimpleNamespace(
        load_E=expert_load(expert_UK, np.reshape(segments_BT, -1), num_experts),
        balance=balances(scores_BTE, expert_UK.reshape(batch, length, -1), moe, segments_BT),
        gates_BTK=gates_UK.reshape(batch, length, -1),
        expert_BTK=expert_UK.reshape(batch, length, -1),
        scores_BTE=scores_BTE,
    )
    return out_UD.reshape(x_BTD.shape), aux
