"""Grouped-query attention over a packed batch, a token and a head at a time.

Source: Ainslie et al. 2023 (arXiv 2305.13245), section 2; biases as in Qwen2's published code.
"""

import numpy as np

from .mla import attend
from .rope import apply_rope, frequencies_and_magnitude, softmax_scale


def project(x_D, position, weights, attention):
    """One token's rotated queries q_NA, rotated keys k_IA and values v_IH."""
    q_NA = np.einsum("d,dna->na", x_D, weights["w_q_DNA"])
    k_IA = np.einsum("d,dia->ia", x_D, weights["w_k_DIA"])
    v_IH = np.einsum("d,dih->ih", x_D, weights["w_v_DIH"])
    if "b_q_NA" in weights:
        q_NA, k_IA, v_IH = (
            q_NA + weights["b_q_NA"],
            k_IA + weights["b_k_IA"],
            v_IH + weights["b_v_IH"],
        )
    frequencies_r, magnitude = frequencies_and_magnitude(q_NA.shape[1], attention.rope)
    q_NA = np.stack([apply_rope(q_A, position, frequencies_r, magnitude) for q_A in q_NA])
    k_IA = np.stack([apply_rope(k_A, position, frequencies_r, magnitude) for k_A in k_IA])
    return q_NA, k_IA, v_IH


def gqa(x_BTD, weights, attention, *, segments_BT, positions_BT):
    """Every query head with a copy of the key/value head of its group, then `attend`, then W^O."""
    batch, length, _ = x_BTD.shape
    q_BTNA, k_BTNA, v_BTNH = [], [], []
    for b in range(batch):
        for t in range(length):
            q_NA, k_IA, v_IH = project(x_BTD[b, t], positions_BT[b, t], weights, attention)
            group = len(q_NA) // len(k_IA)
            q_BTNA.append(q_NA)
            k_BTNA.append(np.stack([k_IA[n // group] for n in range(len(q_NA))]))
            v_BTNH.append(np.stack([v_IH[n // group] for n in range(len(q_NA))]))
    q_BTNA, k_BTNA, v_BTNH = (
        np.reshape(a, (batch, length, *a[0].shape)) for a in (q_BTNA, k_BTNA, v_BTNH)
    )
    scale = softmax_scale(q_BTNA.shape[-1], attention.rope.yarn)
    out_BTNH, _ = attend(q_BTNA, k_BTNA, v_BTNH, segments_BT, positions_BT, scale)
    return np.einsum("btnh,nhd->btd", out_BTNH, weights["w_o_NHD"]) + weights.get("b_o_D", 0.0)
