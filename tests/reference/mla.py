"""Multi-head latent attention: naive over a packed batch, and absorbed for one query.

Source: V2 section 2.1 (eq. 9-19, appendix C), V3 section 2.1.1 (eq. 1-11).
"""

import numpy as np

from .layers import log_sum_exp, rms_norm, softmax
from .rope import apply_rope, frequencies_and_magnitude, softmax_scale


def queries(x_D, position, weights, attention):
    """One token's queries q_NA, nope first, rope part rotated.

    Source: V3 eq. 6-9; without a q latent (V2-Lite) W^Q h takes the place of eq. 6-8.
    """
    if "w_dq_DQ" in weights:
        latent_Q = rms_norm(
            x_D @ weights["w_dq_DQ"], weights["q_norm_Q"], attention.latent_norm_eps
        )
        q_NA = np.einsum("q,qna->na", latent_Q, weights["w_uq_QNA"])
    else:
        q_NA = np.einsum("d,dna->na", x_D, weights["w_q_DNA"])
    frequencies_r, magnitude = frequencies_and_magnitude(attention.rope_dim, attention.rope)
    for n in range(q_NA.shape[0]):
        q_NA[n, attention.nope_dim :] = apply_rope(
            q_NA[n, attention.nope_dim :], position, frequencies_r, magnitude
        )
    return q_NA


def latent_entry(x_D, position, weights, attention):
    """One token's cache entry Z: the normed kv latent c^KV, then the rotated shared key k^R.

    Source: V3 eq. 1 and 3; the latent's RMSNorm is from V2 section 3.1.2.
    """
    both_Z = x_D @ weights["w_dkvr_DZ"]
    kv_latent_dim = both_Z.shape[0] - attention.rope_dim
    latent_C = rms_norm(both_Z[:kv_latent_dim], weights["kv_norm_C"], attention.latent_norm_eps)
    frequencies_r, magnitude = frequencies_and_magnitude(attention.rope_dim, attention.rope)
    key_R = apply_rope(both_Z[kv_latent_dim:], position, frequencies_r, magnitude)
    return np.concatenate([latent_C, key_R])


def keys_and_values(entry_Z, weights, attention):
    """Expands one cache entry to k_NA (nope from the latent, rope shared by all heads) and v_NH.

    Source: V3 eq. 2, 4 and 5.
    """
    kv_latent_dim = entry_Z.shape[0] - attention.rope_dim
    both_NY = np.einsum("c,cny->ny", entry_Z[:kv_latent_dim], weights["w_ukv_CNY"])
    num_heads = both_NY.shape[0]
    k_NA = np.zeros((num_heads, attention.nope_dim + attention.rope_dim))
    v_NH = np.zeros((num_heads, both_NY.shape[1] - attention.nope_dim))
    for n in range(num_heads):
        k_NA[n, : attention.nope_dim] = both_NY[n, : attention.nope_dim]
        k_NA[n, attention.nope_dim :] = entry_Z[kv_latent_dim:]
        v_NH[n] = both_NY[n, attention.nope_dim :]
    return k_NA, v_NH


def attend(q_BTNA, k_BTNA, v_BTNH, segments_BT, positions_BT, scale):
    """Softmax attention to the same segment's positions up to the query's own.

    Source: V3 eq. 10, for packed documents.

    Returns:
        (out_BTNH, lse_BTN: log of the sum of the exponentials).
    """
    batch, length, num_heads, _ = q_BTNA.shape
    out_BTNH = np.zeros((batch, length, num_heads, v_BTNH.shape[-1]))
    lse_BTN = np.zeros((batch, length, num_heads))
    for b in range(batch):
        for t in range(length):
            seen = [
                s
                for s in range(length)
                if segments_BT[b, s] == segments_BT[b, t]
                and positions_BT[b, s] <= positions_BT[b, t]
            ]
            for n in range(num_heads):
                logits_S = np.array([q_BTNA[b, t, n] @ k_BTNA[b, s, n] for s in seen]) * scale
                weights_S = softmax(logits_S)
                lse_BTN[b, t, n] = log_sum_exp(logits_S)
                for weight, s in zip(weights_S, seen, strict=True):
                    out_BTNH[b, t, n] += weight * v_BTNH[b, s, n]
    return out_BTNH, lse_BTN


def mla(x_BTD, weights, attention, *, segments_BT, positions_BT):
    """The naive form: keys and values of every token expanded, then `attend`, then W^O.

    Source: V3 eq. 1-11.
    """
    batch, length, _ = x_BTD.shape
    q_BTNA, k_BTNA, v_BTNH = [], [], []
    for b in range(batch):
        for t in range(length):
            position = positions_BT[b, t]
            q_BTNA.append(queries(x_BTD[b, t], position, weights, attention))
            entry_Z = latent_entry(x_BTD[b, t], position, weights, attention)
            k_NA, v_NH = keys_and_values(entry_Z, weights, attention)
            k_BTNA.append(k_NA)
            v_BTNH.append(v_NH)
    q_BTNA, k_BTNA, v_BTNH = (
        np.reshape(a, (batch, length, *a[0].shape)) for a in (q_BTNA, k_BTNA, v_BTNH)
    )
    scale = softmax_scale(attention.nope_dim + attention.rope_dim, attention.rope.yarn)
    out_BTNH, _ = attend(q_BTNA, k_BTNA, v_BTNH, segments_BT, positions_BT, scale)
    return np.einsum("btnh,nhd->btd", out_BTNH, weights["w_o_NHD"])


def attend_latent(q_NZ, latent_SZ, kv_latent_dim, scale):
    """One multi-query attention over a latent cache: keys are whole entries, values their latents.

    Source: V2 section 2.1.2 and appendix C: W^UK absorbed into W^UQ, W^UV into W^O.

    Returns:
        (out_NC, lse_N).
    """
    out_NC = np.zeros((q_NZ.shape[0], kv_latent_dim))
    lse_N = np.zeros(q_NZ.shape[0])
    for n in range(q_NZ.shape[0]):
        logits_S = np.array([q_NZ[n] @ entry_Z for entry_Z in latent_SZ]) * scale
        lse_N[n] = log_sum_exp(logits_S)
        for weight, entry_Z in zip(softmax(logits_S), latent_SZ, strict=True):
            out_NC[n] += weight * entry_Z[:kv_latent_dim]
    return out_NC, lse_N


def absorbed_queries(q_NA, weights, attention):
    """Takes the nope part of each head's query into the latent space: [q_nope W^UK ; q_rope] (NZ).

    Source: V2 section 2.1.2 (absorption).
    """
    num_heads = q_NA.shape[0]
    kv_latent_dim = weights["w_ukv_CNY"].shape[0]
    q_NZ = np.zeros((num_heads, kv_latent_dim + attention.rope_dim))
    for n in range(num_heads):
        w_uk_CP = weights["w_ukv_CNY"][:, n, : attention.nope_dim]
        q_NZ[n, :kv_latent_dim] = w_uk_CP @ q_NA[n, : attention.nope_dim]
        q_NZ[n, kv_latent_dim:] = q_NA[n, attention.nope_dim :]
    return q_NZ


def mla_absorbed(x_D, position, latent_SZ, weights, attention):
    """The absorbed form for one query over the entries it may see, its own among them.

    Source: V2 section 2.1.2 and appendix C; equals `mla` on the same tokens.
    """
    kv_latent_dim = weights["w_ukv_CNY"].shape[0]
    q_NA = queries(x_D, position, weights, attention)
    q_NZ = absorbed_queries(q_NA, weights, attention)
    scale = softmax_scale(attention.nope_dim + attention.rope_dim, attention.rope.yarn)
    out_NC, _ = attend_latent(q_NZ, latent_SZ, kv_latent_dim, scale)
    out_D = np.zeros(weights["w_o_NHD"].shape[-1])
    for n in range(q_NA.shape[0]):
        w_uv_CH = weights["w_ukv_CNY"][:, n, attention.nope_dim :]
        out_D += (out_NC[n] @ w_uv_CH) @ weights["w_o_NHD"][n]
    return out_D
