"""Multi-token prediction: hidden states of depths 1..M, and their loss.

Source: V3 section 2.2 (eq. 21-25). `tokens[i]` is the paper's t_i, `targets[i]` its t_{i+1}: depth
k at position i reads tokens[i + k] and predicts targets[i + k].
"""

from types import SimpleNamespace

import numpy as np

from .block import block
from .layers import cross_entropy, rms_norm


def depth_segments(segments_BT, depth):
    """Segments of one depth: 0 (padding) where token i + k is not in position i's own document.

    Source: V3 eq. 22, whose block runs over positions 1..T-k; here a document at a time.
    """
    batch, length = segments_BT.shape
    out_BT = np.zeros((batch, length), np.int64)
    for b in range(batch):
        for i in range(length - depth):
            if segments_BT[b, i + depth] == segments_BT[b, i]:
                out_BT[b, i] = segments_BT[b, i]
    return out_BT


def mtp_depth(
    hidden_BTD,
    next_tokens_BT,
    weights,
    embed_VD,
    *,
    attention,
    moe,
    norm_eps,
    segments_BT,
    positions_BT,
):
    """One depth: the previous depth's hidden (after its final norm) and tokens i + k, to hidden.

    Source: V3 eq. 21-22.

    Returns:
        (hidden_BTD after this depth's own final norm, the block's aux).
    """
    batch, length, width = hidden_BTD.shape
    x_BTD = np.zeros((batch, length, width))
    for b in range(batch):
        for i in range(length):
            embedding_D = embed_VD[next_tokens_BT[b, i]]
            # Differs from the paper: eq. 21 has the hidden state first, the published `eh_proj`
            # the embedding.
            both_2D = np.concatenate(
                [
                    rms_norm(embedding_D, weights["embedding_norm_D"], norm_eps),
                    rms_norm(hidden_BTD[b, i], weights["hidden_norm_D"], norm_eps),
                ]
            )
            x_BTD[b, i] = both_2D @ weights["w_proj_2DD"]
    x_BTD, aux = block(
        x_BTD,
        weights["block"],
        attention=attention,
        moe=moe,
        norm_eps=norm_eps,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
    )
    return rms_norm(x_BTD, weights["final_norm_D"], norm_eps), aux


def mtp_forward(
    hidden_BTD, tokens_BT, depths, embed_VD, *, attention, moe, norm_eps, segments_BT, positions_BT
):
    """All depths in a chain, from the main model's hidden state after its final norm.

    Source: V3 eq. 21-22.

    Returns:
        A list, one a depth, of (hidden_BTD, segments_BT of that depth, aux).
    """
    batch, length = tokens_BT.shape
    outputs = []
    for k, weights in enumerate(depths, start=1):
        segments_k_BT = depth_segments(segments_BT, k)
        next_tokens_BT = np.zeros((batch, length), np.int64)
        for b in range(batch):
            for i in range(length - k):
                next_tokens_BT[b, i] = tokens_BT[b, i + k]
        hidden_BTD, aux = mtp_depth(
            hidden_BTD,
            next_tokens_BT,
            weights,
            embed_VD,
            attention=attention,
            moe=moe,
            norm_eps=norm_eps,
            segments_BT=segments_k_BT,
            positions_BT=positions_BT,
        )
        outputs.append(SimpleNamespace(hidden_BTD=hidden_BTD, segments_BT=segments_k_BT, aux=aux))
    return outputs


def mtp_loss(outputs, targets_BT, weights_BT, head_DV, *, mtp_weight, denominators=None):
    """lambda / M * sum over depths of the weighted mean cross entropy of token i + 1 + k.

    Source: V3 eq. 23-25.

    Args:
        outputs: what `mtp_forward` returns.
        targets_BT: the main model's targets, t_{i+1}.
        weights_BT: the main model's loss weights; depth k uses targets[i + k] with weights[i + k].
        head_DV: the shared head.
        mtp_weight: lambda.
        denominators: one a depth; None takes the weights that survive the depth's mask.

    Returns:
        (loss, list of each depth's mean cross entropy).
    """
    per_depth = []
    for k, output in enumerate(outputs, start=1):
        total, surviving = 0.0, 0.0
        batch, length = targets_BT.shape
        for b in range(batch):
            for i in range(length - k):
                if output.segments_BT[b, i] != 0:
                    logits_V = output.hidden_BTD[b, i] @ head_DV
                    weight = weights_BT[b, i + k]
                    total += weight * cross_entropy(logits_V, targets_BT[b, i + k])
                    surviving += weight
        # Differs from the paper: eq. 24 divides by T, though T - k terms are summed.
        divisor = surviving if denominators is None else denominators[k - 1]
        per_depth.append(total / divisor if divisor > 0 else 0.0)
    return mtp_weight * sum(per_depth) / len(per_depth), per_depth
