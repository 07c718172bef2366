"""Routers of V3 and V2, loads, the balance losses of both, and the bias update.

Source: V3 section 2.1.2 (eq. 12-20), V2 section 2.2 (eq. 20-31).
"""

from types import SimpleNamespace

import numpy as np

from .layers import sigmoid, softmax


def top_k(values_E, k):
    """Indices of the k largest, largest first; of equal ones the lower index."""
    chosen = []
    for _ in range(k):
        best = None
        for e, value in enumerate(values_E):
            if e not in chosen and (best is None or value > values_E[best]):
                best = e
        chosen.append(best)
    return chosen


def mask_groups(values_E, group_scores_J, groups_per_token):
    """Puts -inf on every expert outside the best groups.

    Source: V2 section 2.2.2, V3 section 2.1.2 "Node-Limited Routing".
    """
    group_size = len(values_E) // len(group_scores_J)
    kept = top_k(group_scores_J, groups_per_token)
    return np.array([v if e // group_size in kept else -np.inf for e, v in enumerate(values_E)])


def route_v3(
    logits_UE,
    bias_E,
    *,
    num_groups,
    groups_per_token,
    experts_per_token,
    scale,
    normalize=True,
):
    """Sigmoid router: the bias selects, unbiased scores make the gates.

    Source: V3 eq. 13-16; groups scored by the sum of their top 2 of s + b. The 1e-20 and `scale`
    are the published code's.

    Returns:
        (gates_UK, expert_UK by falling s + b, scores_UE).
    """
    num_tokens, num_experts = logits_UE.shape
    group_size = num_experts // num_groups
    scores_UE = sigmoid(logits_UE)
    gates_UK = np.zeros((num_tokens, experts_per_token))
    expert_UK = np.zeros((num_tokens, experts_per_token), np.int64)
    for u in range(num_tokens):
        biased_E = scores_UE[u] + bias_E
        group_scores_J = []
        for j in range(num_groups):
            members = sorted(biased_E[j * group_size : (j + 1) * group_size], reverse=True)
            group_scores_J.append(sum(members[:2]))
        if num_groups > 1:
            biased_E = mask_groups(biased_E, group_scores_J, groups_per_token)
        expert_UK[u] = top_k(biased_E, experts_per_token)
        gates_UK[u] = [scores_UE[u, e] for e in expert_UK[u]]
        if normalize:
            gates_UK[u] /= np.sum(gates_UK[u]) + 1e-20
        gates_UK[u] *= scale
    return gates_UK, expert_UK, scores_UE


def route_v2(logits_UE, *, num_groups, groups_per_token, experts_per_token, scale):
    """Softmax router: groups scored by their maximum, gates the raw scores times `scale`, no bias.

    Source: V2 eq. 20-22 and section 2.2.2; `scale` is the published code's.

    Returns:
        (gates_UK, expert_UK by falling score, scores_UE).
    """
    num_tokens, num_experts = logits_UE.shape
    group_size = num_experts // num_groups
    scores_UE = np.array([softmax(logits_E) for logits_E in logits_UE])
    gates_UK = np.zeros((num_tokens, experts_per_token))
    expert_UK = np.zeros((num_tokens, experts_per_token), np.int64)
    for u in range(num_tokens):
        allowed_E = scores_UE[u]
        if num_groups > 1:
            group_scores_J = [
                max(scores_UE[u, j * group_size : (j + 1) * group_size]) for j in range(num_groups)
            ]
            allowed_E = mask_groups(allowed_E, group_scores_J, groups_per_token)
        expert_UK[u] = top_k(allowed_E, experts_per_token)
        gates_UK[u] = [scores_UE[u, e] * scale for e in expert_UK[u]]
    return gates_UK, expert_UK, scores_UE


def dense_gates(gates_UK, expert_UK, num_experts):
    """Gates as a whole row of E, 0 where not chosen: free of the order of choices.

    Source: V3 eq. 14.
    """
    dense_UE = np.zeros((len(gates_UK), num_experts))
    for u in range(len(gates_UK)):
        for gate, e in zip(gates_UK[u], expert_UK[u], strict=True):
            dense_UE[u, e] = gate
    return dense_UE


def expert_load(expert_UK, segments_U, num_experts):
    """How many real tokens chose each expert (int64, sums to K times the real tokens).

    Source: V3 section 2.1.2, "Auxiliary-Loss-Free Load Balancing".
    """
    load_E = np.zeros(num_experts, np.int64)
    for expert_K, segment in zip(expert_UK, segments_U, strict=True):
        if segment != 0:
            for e in expert_K:
                load_E[e] += 1
    return load_E


def balance_loss(scores_BTE, segments_BT, *, experts_per_token, alpha):
    """Alpha * sum_e f_e P_e a row, padding in neither, mean over rows that hold a real token.

    f_e counts the top K of the scores themselves (no bias, no groups), so that it is another
    statistic than the load.

    Source: V3 eq. 17-20.
    """
    num_experts = scores_BTE.shape[-1]
    per_row = []
    for scores_TE, segments_T in zip(scores_BTE, segments_BT, strict=True):
        real = [t for t in range(len(segments_T)) if segments_T[t] != 0]
        if not real:
            continue
        count_E = np.zeros(num_experts)
        share_E = np.zeros(num_experts)
        for t in real:
            for e in top_k(scores_TE[t], experts_per_token):
                count_E[e] += 1.0
            share_E += scores_TE[t] / np.sum(scores_TE[t])
        f_E = num_experts / (experts_per_token * len(real)) * count_E
        p_E = share_E / len(real)
        per_row.append(np.sum(f_E * p_E))
    return alpha * float(np.mean(per_row)) if per_row else 0.0


def v2_balance_losses(scores_BTE, expert_BTK, segments_BT, *, num_groups, groups_per_token):
    """V2's three losses with every alpha 1, mean over rows that hold a real token.

    Source: V2 eq. 23-25 (expert), 26-28 (device), 29-31 (communication); the groups of the
    device-limited router are the devices, M is `groups_per_token`, T a row's real tokens.

    Args:
        scores_BTE: s, used in P as it is.
        expert_BTK: the experts that each token counts for.
        segments_BT: 0 is padding.
        num_groups: the paper's D.
        groups_per_token: the paper's M.

    Returns:
        expert, device, communication.
    """
    num_experts, per_token = scores_BTE.shape[-1], expert_BTK.shape[-1]
    size = num_experts // num_groups
    expert, device, communication = [], [], []
    for scores_TE, expert_TK, segments_T in zip(scores_BTE, expert_BTK, segments_BT, strict=True):
        real = [t for t in range(len(segments_T)) if segments_T[t] != 0]
        if not real:
            continue
        f_E, p_E, sent_J = np.zeros(num_experts), np.zeros(num_experts), np.zeros(num_groups)
        for t in real:
            for e in range(num_experts):
                f_E[e] += num_experts / (per_token * len(real)) * (e in expert_TK[t])
                p_E[e] += scores_TE[t, e] / len(real)
            for j in {e // size for e in expert_TK[t]}:
                sent_J[j] += num_groups / (groups_per_token * len(real))
        members = [range(j * size, (j + 1) * size) for j in range(num_groups)]
        p_J = [sum(p_E[e] for e in group) for group in members]
        f_J = [sum(f_E[e] for e in group) / size for group in members]
        expert.append(sum(f_E[e] * p_E[e] for e in range(num_experts)))
        device.append(sum(f_J[j] * p_J[j] for j in range(num_groups)))
        communication.append(sum(sent_J[j] * p_J[j] for j in range(num_groups)))
    means = [float(np.mean(rows)) if rows else 0.0 for rows in (expert, device, communication)]
    return SimpleNamespace(expert=means[0], device=means[1], communication=means[2])


def update_bias(bias_E, load_E, gamma):
    """b_e += gamma * sign(mean load - load_e), on the global load of a step.

    Source: V3 section 2.1.2; Wang et al. 2024 (arXiv 2408.15664), algorithm 1.
    """
    mean = np.sum(load_E) / len(load_E)
    return np.array([b + gamma * np.sign(mean - n) for b, n in zip(bias_E, load_E, strict=True)])


def max_violation(load_E):
    """(largest load - mean load) / mean load.

    Source: Wang et al. 2024 (arXiv 2408.15664), MaxVio.
    """
    mean = np.sum(load_E) / len(load_E)
    return float((np.max(load_E) - mean) / mean)
