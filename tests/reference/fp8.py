"""FP8's linear layers: every operand rounded as published, and multiplied in float64.

Source: V3 report 3.3.1 to 3.3.3. Activations and gradients share a scale with 127 neighbours along
what the product contracts, weights with the others of a block of 128x128. Knows nothing about JAX.

    M or X rows      K contracted in the forward product      N columns      F hidden      E experts
"""

import ml_dtypes
import numpy as np

TILE, LARGEST = 128, np.float32(448.0)
SMALLEST_SCALE = np.float32(2.0**-116)


def scale_of(amax, power_of_two=False):
    """The scale of a tile whose largest magnitude is given."""
    if not np.isfinite(amax):
        return np.float32(np.nan)
    if amax < 2.0**-126:
        return np.float32(1.0)
    scale = max(np.float32(amax) / LARGEST, SMALLEST_SCALE)
    if power_of_two:
        mantissa, exponent = np.frexp(scale)  # mantissa in [1/2, 1)
        scale = np.ldexp(np.float32(1.0), exponent - (mantissa == 0.5))
    return np.float32(scale)


def rounded(x_MK, height=1, power_of_two=False):
    """What the FP8 numbers stand for, float64, in tiles of `height` x 128."""
    x_MK = np.asarray(x_MK, np.float32)
    out = np.empty(x_MK.shape)
    for row in range(0, x_MK.shape[0], height):
        for column in range(0, x_MK.shape[1], TILE):
            here = slice(row, row + height), slice(column, column + TILE)
            scale = scale_of(np.max(np.abs(x_MK[here])), power_of_two)
            q = np.clip(x_MK[here] / scale, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
            out[here] = q.astype(np.float64) * scale
    return out


def weight(w_KN, power_of_two=False, parts=1):
    """`rounded` in blocks of 128x128; parts of the columns have blocks of their own."""
    columns = np.split(np.asarray(w_KN), parts, axis=1)
    return np.concatenate([rounded(part, TILE, power_of_two) for part in columns], axis=1)


def linear(x_MK, w_KN, dy_MN, *, scale=False, gradient_scale=False, weight_scale=False, parts=1):
    """The three products of a linear layer; whether scales are powers of two is told of each.

    Returns:
        (y_MN, dx_MK, dw_KN).
    """
    w_KN = weight(w_KN, weight_scale, parts)
    y_MN = rounded(x_MK, 1, scale) @ w_KN
    dx_MK = rounded(dy_MN, 1, gradient_scale) @ w_KN.T
    # Along the rows this time, which is what the gradient of a weight contracts.
    x_KM, dy_NM = (
        rounded(np.asarray(x).T, 1, s) for x, s in ((x_MK, scale), (dy_MN, gradient_scale))
    )
    return y_MN, dx_MK, x_KM @ dy_NM.T


def swiglu(gate_up_XF, gates_X, dtype):
    """SwiGLU times a number a row: rounded to `dtype` before and after that product."""
    gate, up = np.split(np.asarray(gate_up_XF, np.float64), 2, axis=1)
    hidden_XF = (gate / (1.0 + np.exp(-gate)) * up).astype(dtype)
    if gates_X is not None:
        gates_X1 = np.asarray(gates_X)[:, None].astype(dtype)
        hidden_XF = (hidden_XF.astype(np.float64) * gates_X1.astype(np.float64)).astype(dtype)
    return hidden_XF


def swiglu_gradient(gate_up_XF, gates_X, dhidden_XF):
    """Gradients of SwiGLU's input and of the numbers of the rows."""
    gate, up = np.split(np.asarray(gate_up_XF, np.float64), 2, axis=1)
    gates_X1 = np.ones((len(gate), 1)) if gates_X is None else np.asarray(gates_X)[:, None]
    sigmoid = 1.0 / (1.0 + np.exp(-gate))
    dgates_X = np.sum(dhidden_XF * gate * sigmoid * up, axis=1)
    dhidden_XF = dhidden_XF * gates_X1
    dgate = dhidden_XF * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return np.concatenate([dgate, dhidden_XF * gate * sigmoid], axis=1), dgates_X


def swiglu_linear(
    gate_up_X2F,
    gates_X,
    w_FN,
    dy_XN,
    dtype,
    *,
    scale=False,
    gradient_scale=False,
    weight_scale=False,
):
    """SwiGLU and a linear layer, whose backward pass knows SwiGLU's input in FP8 alone.

    Returns:
        (y_XN, dgate_up_X2F, dgates_X, dw_FN).
    """
    w_FN = weight(w_FN, weight_scale)
    y_XN = rounded(swiglu(gate_up_X2F, gates_X, dtype), 1, scale) @ w_FN
    kept_X2F = rounded(gate_up_X2F, 1, scale).astype(dtype)
    hidden_FX = rounded(swiglu(kept_X2F, gates_X, dtype).T, 1, scale)
    dw_FN = hidden_FX @ rounded(np.asarray(dy_XN).T, 1, gradient_scale).T
    dhidden_XF = (rounded(dy_XN, 1, gradient_scale) @ w_FN.T).astype(dtype).astype(np.float64)
    dgate_up_X2F, dgates_X = swiglu_gradient(kept_X2F, gates_X, dhidden_XF)
    return y_XN, dgate_up_X2F, dgates_X, dw_FN


def grouped(function, tile_expert, rows, weights):
    """A layer with a weight an expert.

    Args:
        function: of one expert's rows and its weight; returns results by row and, last, the
            gradient of the weight.
        tile_expert: the expert of each tile of rows; more than there are marks an unused one, whose
            results are zero.
        rows: arrays that have the rows.
        weights: [E, ...].
    """
    expert_X = np.repeat(tile_expert, len(rows[0]) // len(tile_expert))
    results, gradients = [], []
    for e, w in enumerate(weights):
        mine = expert_X == e
        *by_row, dw = function(*(x[mine] for x in rows), w)
        results = results or [np.zeros((len(expert_X), *x.shape[1:])) for x in by_row]
        for whole, part in zip(results, by_row, strict=True):
            whole[mine] = part
        gradients.append(dw)
    return *results, np.stack(gradients)


def e5m6(x_K):
    """Twelve bits a number, a power-of-two scale for each 128: what comes back, float64.

    Of a tile whose largest magnitude lies in [2^8, 2^9) once scaled, numbers below 2^-14 are zero.
    """
    x_K = np.asarray(x_K, np.float64)
    out = np.zeros(x_K.shape)
    for row in np.ndindex(x_K.shape[:-1]):
        for start in range(0, x_K.shape[-1], TILE):
            here = (*row, slice(start, start + TILE))
            tile = x_K[here]
            amax = np.max(np.abs(tile))
            if not np.isfinite(amax):
                out[here] = np.nan
                continue
            exponent = np.clip(np.floor(np.log2(amax)) - 8, -126, 119) if amax else 0.0
            scaled = tile / 2.0**exponent
            top = np.floor(np.log2(np.where(scaled == 0, 1.0, np.abs(scaled))))
            step = 2.0 ** (top - 6)  # seven bits of a number, of which the first is not stored
            scaled = np.round(scaled / step) * step  # to even
            out[here] = np.where(np.abs(scaled) < 2.0**-14, 0.0, scaled) * 2.0**exponent
    return out
