"""Mixture of experts: shared experts plus gated routed ones, a token and an expert at a time.

Source: V3 eq. 12, V2 eq. 20.
"""

from types import SimpleNamespace

import numpy as np

from .layers import swiglu
from .router import balance_loss, expert_load, route_v2, route_v3


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


def moe_layer(x_BTD, weights, moe, *, segments_BT):
    """Shared experts of x, plus each chosen expert of x times its gate (no residual here).

    Source: V3 eq. 12. Padding is computed too, and counts nowhere.

    Returns:
        (out_BTD, aux: load_E int, balance (alpha 1), gates_BTK, expert_BTK, scores_BTE).
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
        balance=balance_loss(
            scores_BTE, segments_BT, experts_per_token=moe.num_experts_per_token, alpha=1.0
        ),
        gates_BTK=gates_UK.reshape(batch, length, -1),
        expert_BTK=expert_UK.reshape(batch, length, -1),
        scores_BTE=scores_BTE,
    )
    return out_UD.reshape(x_BTD.shape), aux
