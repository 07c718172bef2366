"""One pre-norm transformer block (apart from `transformer`, since `mtp` needs it too)."""

import numpy as np

from .gqa import gqa
from .layers import rms_norm, swiglu
from .mla import mla
from .moe import moe_layer


def block(x_BTD, weights, *, attention, moe, norm_eps, segments_BT, positions_BT):
    """u = x + attention(norm(x)); h = u + FFN(norm(u)); the FFN is MoE if it has a router.

    Attention is grouped-query if its keys have a matrix of their own, else MLA.

    Source: V2 section 2 (figure 2), V3 eq. 12 for the residual around the FFN.

    Returns:
        (out_BTD, the MoE's aux or None).
    """
    normed_BTD = rms_norm(x_BTD, weights["attention_norm_D"], norm_eps)
    attend = gqa if "w_k_DIA" in weights["attention"] else mla
    x_BTD = x_BTD + attend(
        normed_BTD,
        weights["attention"],
        attention,
        segments_BT=segments_BT,
        positions_BT=positions_BT,
    )
    normed_BTD = rms_norm(x_BTD, weights["ffn_norm_D"], norm_eps)
    ffn = weights["ffn"]
    if "w_router_DE" in ffn:
        out_BTD, aux = moe_layer(normed_BTD, ffn, moe, segments_BT=segments_BT)
        return x_BTD + out_BTD, aux
    out_BTD = np.zeros(x_BTD.shape)
    for b in range(x_BTD.shape[0]):
        for t in range(x_BTD.shape[1]):
            out_BTD[b, t] = swiglu(normed_BTD[b, t], ffn["w_in_D2F"], ffn["w_down_FD"])
    return x_BTD + out_BTD, None
