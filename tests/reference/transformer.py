"""The whole model forward, and the three losses it is trained on."""

from types import SimpleNamespace

import numpy as np

from .block import block
from .layers import cross_entropy, rms_norm
from .mtp import mtp_forward, mtp_loss


def forward(params, tokens_BT, *, attention, moe, norm_eps, positions_BT=None, segments_BT=None):
    """Embedding, blocks, final norm, head; then the MTP depths if `params` has any.

    Source: V2 section 2, V3 section 2.

    Args:
        params: see the package's docstring.
        tokens_BT: ints in [0, V).
        attention: settings of every layer's attention.
        moe: settings of every MoE layer, or None.
        norm_eps: of every norm but the latents'.
        positions_BT: from the start of each document; None counts from 0.
        segments_BT: documents of a packed row, 0 for padding; None is one document a row.

    Returns:
        hidden_BTD after the final norm, logits_BTV, layers: the residual stream leaving each
        layer, aux: one a layer (None where dense), mtp: one a depth (`mtp.mtp_forward`).
    """
    batch, length = tokens_BT.shape
    if positions_BT is None:
        positions_BT = np.tile(np.arange(length), (batch, 1))
    if segments_BT is None:
        segments_BT = np.ones((batch, length), np.int64)
    where = {"segments_BT": segments_BT, "positions_BT": positions_BT}
    settings = {"attention": attention, "moe": moe, "norm_eps": norm_eps}
    params = _to_float64(params)

    x_BTD = params["embed_VD"][tokens_BT]
    layers, aux = [], []
    for weights in params["layers"]:
        x_BTD, layer_aux = block(x_BTD, weights, **settings, **where)
        layers.append(x_BTD)
        aux.append(layer_aux)
    hidden_BTD = rms_norm(x_BTD, params["final_norm_D"], norm_eps)
    depths = params.get("mtp") or []
    mtp = mtp_forward(hidden_BTD, tokens_BT, depths, params["embed_VD"], **settings, **where)
    logits_BTV = hidden_BTD @ head(params)
    return SimpleNamespace(
        hidden_BTD=hidden_BTD, logits_BTV=logits_BTV, layers=layers, aux=aux, mtp=mtp
    )


def head(params):
    """The head's matrix [D, V]; without one of its own, the embedding's transposed."""
    return params["head_DV"] if "head_DV" in params else params["embed_VD"].T


def losses(params, output, targets_BT, weights_BT, *, mtp_weight=0.0, balance_weights=(0, 0, 0)):
    """The main, MTP and balance losses of one whole batch, and their sum.

    Source: V3 section 2 (main), eq. 17-20 (balance), eq. 21-25 (MTP); V2 eq. 23-31 (balance).

    Returns:
        main: sum of weight * CE over the sum of weights; mtp: lambda times the mean over depths;
        balance: the expert, device and communication losses, each alpha times the sum over MoE
        layers, MTP's among them; total: the sum; mtp_depths: each depth's mean CE.
    """
    params = _to_float64(params)
    total, weight_sum = 0.0, 0.0
    for b in range(targets_BT.shape[0]):
        for t in range(targets_BT.shape[1]):
            if weights_BT[b, t] != 0:
                ce = cross_entropy(output.logits_BTV[b, t], targets_BT[b, t])
                total += weights_BT[b, t] * ce
                weight_sum += weights_BT[b, t]
    main = total / weight_sum
    mtp, mtp_depths = 0.0, []
    if output.mtp:
        mtp, mtp_depths = mtp_loss(
            output.mtp, targets_BT, weights_BT, head(params), mtp_weight=mtp_weight
        )
    routed = [aux for aux in [*output.aux, *(m.aux for m in output.mtp)] if aux is not None]
    balance = [
        alpha * sum(getattr(aux.balance, level) for aux in routed)
        for alpha, level in zip(balance_weights, ("expert", "device", "communication"), strict=True)
    ]
    total = main + mtp + sum(balance)
    return SimpleNamespace(main=main, mtp=mtp, balance=balance, total=total, mtp_depths=mtp_depths)


def _to_float64(tree):
    if isinstance(tree, dict):
        return {name: _to_float64(leaf) for name, leaf in tree.items()}
    if isinstance(tree, list | tuple):
        return [_to_float64(leaf) for leaf in tree]
    return None if tree is None else np.asarray(tree, np.float64)
